"""The diffusion prior of a bundle: CLIPure-Diff without PyTorch.

The file holds one evaluation of the prior's loss with its gradient, traced into the graph; the
steps between are `_core`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.onnx_runtime import Session, run_session
from edgeclip.errors import BundleError, DeviceError
from edgeclip.purify import DiffPurifier

INPUTS = ("z", "timestep", "noise")  # unit embeddings (N, D), int64 (N,), float32 (N, D)
OUTPUTS = ("loss", "gradient")  # (N,), and of it with respect to z (N, D)


class Prior:
    """The step of a bundle, on one device. May be shared by threads.

    Raises DeviceError where the device does not work, BundleError where the file is not a prior's
    step for embeddings of embed_dim.
    """

    def __init__(
        self, path: Path, embed_dim: int, *, device: str, threads: int | None = None
    ) -> None:
        self._opened = Session(path, device, threads)
        self._path, self._device, self._dim = path, device, embed_dim
        session = self._opened.get()
        found = {
            node.name: node.shape[1:] for node in (*session.get_inputs(), *session.get_outputs())
        }
        row: list[int] = [embed_dim]
        if found != dict(zip((*INPUTS, *OUTPUTS), (row, [], row, [], row), strict=True)):
            raise BundleError(
                f"{path} takes and gives {found}, which is not what the manifest says"
            )

    def loss_and_grad(
        self, z: NDArray[np.float32], timestep: int, noise: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Losses (N,) of unit embeddings z (N, D), and their gradients (N, D).

        timestep and noise (D,) are the same for all.
        """
        inputs: dict[str, NDArray[Any]] = {
            "z": z,
            "timestep": np.full(len(z), timestep, np.int64),
            "noise": np.ascontiguousarray(np.broadcast_to(noise, z.shape)),
        }
        loss, gradient = run_session(self._opened.get(), OUTPUTS, inputs, self._path, self._device)
        return loss, gradient

    def purify(
        self, embeddings: NDArray[np.float32], purifier: DiffPurifier
    ) -> NDArray[np.float32]:
        """Unit embeddings (N, D), purified; see DiffPurifier."""
        for timestep, noise in zip(*purifier.draws(self._dim), strict=True):
            _, gradient = self.loss_and_grad(embeddings, int(timestep), noise)
            if not np.isfinite(gradient).all():
                raise DeviceError(f"{self._path.name} gave no finite gradient on {self._device}")
            embeddings = _core.polar_step(embeddings, gradient, step_size=purifier.step_size)
        return embeddings
