"""The image half of a Runtime on the host: encoder, purification and class scores."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import TOKENS, Encoder, unit
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.backends.prior import Prior
from edgeclip.bundle import Bundle
from edgeclip.errors import BundleError
from edgeclip.labels import LabelSet
from edgeclip.purify import NO_PRIOR, CosPurifier, DiffPurifier, Purifier, check_prior


class HostPipeline:
    """Embeddings and class scores of preprocessed images. May be shared by threads.

    precision: that of the encoder. onnx_device: device of ONNX Runtime, which runs the diffusion prior
    and the graph of the image tokens.
    Raises BundleError if the purifier needs a prior that the bundle does not have.
    """

    def __init__(
        self,
        bundle: Bundle,
        encoder: Encoder,
        purifier: Purifier,
        *,
        precision: str,
        onnx_device: str,
        threads: int,
    ) -> None:
        spec = bundle.manifest.prior
        check_prior(purifier, None if spec is None else spec.timesteps)
        self._bundle, self._encoder, self._purifier = bundle, encoder, purifier
        self._precision, self._onnx_device, self._threads = precision, onnx_device, threads
        self._open_lock = threading.Lock()
        self._token_encoder: OnnxEncoder | None = None
        self._prior: Prior | None = None

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the unit embeddings (N, D) of pixels (N, 3, H, W), before any purification."""
        return unit(self._encoder.embed(pixels))

    def tokens(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return image tokens (N, prefix + P, D); their graph is opened on first use."""
        with self._open_lock:
            if self._token_encoder is None:
                path = self._bundle.encoder("image_tokens", self._precision)
                self._token_encoder = OnnxEncoder(
                    path, device=self._onnx_device, threads=self._threads, output=TOKENS
                )
        return self._token_encoder.embed(pixels)

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the unit embeddings (N, D) of pixels (N, 3, H, W), purified."""
        rows, purifier = self.encode(pixels), self._purifier
        if isinstance(purifier, DiffPurifier):
            return self._open_prior().purify(rows, purifier)
        if isinstance(purifier, CosPurifier):
            null_text, steps = self._bundle.null_text, purifier.steps
            return _core.purify_cos(rows, null_text, steps=steps, step_size=purifier.step_size)
        return rows

    def classify(
        self, pixels: NDArray[np.float32], labels: LabelSet, top_k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return indices and probabilities (N, k) of the labels, the most probable first."""
        manifest, purifier = self._bundle.manifest, self._purifier
        embeddings = self._encoder.embed(pixels)
        if isinstance(purifier, DiffPurifier):
            embeddings = self._open_prior().purify(unit(embeddings), purifier)
        cos = purifier if isinstance(purifier, CosPurifier) else None
        return _core.classify(
            embeddings,
            labels.embeddings,
            logit_scale=manifest.logit_scale,
            logit_bias=manifest.logit_bias,
            null_text=self._bundle.null_text if cos else None,
            null_scores=labels.null_scores if cos else None,
            steps=cos.steps if cos else 0,
            step_size=cos.step_size if cos else 0.0,
            top_k=min(top_k, len(labels)),
        )

    def _open_prior(self) -> Prior:
        """Load the prior on first use: it may be larger than both encoders together."""
        with self._open_lock:
            if self._prior is None:
                spec, dim = self._bundle.manifest.prior, self._bundle.manifest.embed_dim
                if spec is None:
                    raise BundleError(NO_PRIOR)
                path = self._bundle.graph(spec.file)
                self._prior = Prior(path, dim, device=self._onnx_device, threads=self._threads)
            return self._prior
