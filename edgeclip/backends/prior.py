"""Diffusion prior of a bundle: CLIPure-Diff without PyTorch.

The graph evaluates the prior's loss and its gradient once; `_core` computes the step.
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
OUTPUTS = ("loss", "gradient")  # (N,), and its gradient with respect to z (N, D)


class Prior:
    """Prior of a bundle on one device. May be shared by threads.

    Raises DeviceError if the device does not work, BundleError if the file is no prior for embeddings
    of embed_dim.
    """

    def __init__(
        self, path: Path, embed_dim: int, *, device: str, threads: int | None = None
    ) -> None:
        self._opened = Session(path, device, threads)
        self._path, self._device, self._dim = path, device, embed_dim
        session = self._opened.get()
        nodes = (*session.get_inputs(), *session.get_outputs())
        shapes = {node.name: node.shape[1:] for node in nodes}
        row: list[int] = [embed_dim]
        if shapes != dict(zip((*INPUTS, *OUTPUTS), (row, [], row, [], row), strict=True)):
            raise BundleError(
                f"{path} has the inputs and outputs {shapes}, which contradicts the manifest: export "
                "the bundle again"
            )

    def loss_and_grad(
        self, z: NDArray[np.float32], timestep: int, noise: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the losses (N,) of unit embeddings z (N, D), and their gradients (N, D).

        All rows share the timestep and the noise (D,).
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
        """Purify unit embeddings (N, D); see DiffPurifier."""
        for timestep, noise in zip(*purifier.draws(self._dim), strict=True):
            _, gradient = self.loss_and_grad(embeddings, int(timestep), noise)
            if not np.isfinite(gradient).all():
                raise DeviceError(
                    f"{self._path.name} computed a gradient that is not finite on {self._device}: see "
                    "edgeclip doctor"
                )
            embeddings = _core.polar_step(embeddings, gradient, step_size=purifier.step_size)
        return embeddings
