"""The golden check: does this machine compute what the source model computed at export?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.bundle import GOLDEN
from edgeclip.errors import BundleError
from edgeclip.labels import Label
from edgeclip.manifest import PriorSpec
from edgeclip.prior import Prior
from edgeclip.purify import DiffPurifier
from edgeclip.runtime import Runtime

# Largest distance between unit embeddings, by precision: of all but fp32 what the cosines leave that
# an export demands, 0.999 and 0.99.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.045, "int8": 0.142, "int8-qdq": 0.142}
PIXEL_TOLERANCE = 1.0  # steps of 8 bits: Pillow resized the golden image, of whatever version
PRIOR_TOLERANCE = 1e-3  # of a gradient, relative to its norm
SCORE_TOLERANCE = 1e-2  # of probabilities, whose logits are embeddings times a scale of up to 100


def check(runtime: Runtime) -> dict[str, float]:
    """The largest differences from the golden pixels (in 1/255), embeddings (their distance) and scores.

    golden.npz is what PyTorch computed at export: `image` uint8 (H, W, 3), its `pixels`
    (3, h, w) and unit `embedding` (D,); `prompts` (P,), their `ids` (P, L) and unit
    `text_embeddings` (P, D); with a prior the `prior_gradient` (D,) of its loss there, halfway of
    its timesteps, with the first noise of DiffPurifier. Raises BundleError where a difference is
    above its tolerance, token ids differ, or an array is not as said.
    """
    manifest = runtime.bundle.manifest
    arrays = _Arrays(runtime)
    texts = [str(text) for text in arrays.get("prompts", 1)]
    image = arrays.get("image", 3)
    expected_pixels = arrays.get("pixels", 3, manifest.image.size)
    embedding = arrays.get("embedding", 1, (manifest.embed_dim,))
    text_embeddings = arrays.get("text_embeddings", 2, (len(texts), manifest.embed_dim))
    if not np.array_equal(runtime.tokenize(texts), arrays.get("ids", 2)):
        raise BundleError(f"{runtime.bundle.path}: token ids differ from the golden ones")

    pixels = runtime.preprocess([image])
    std = np.asarray(manifest.image.std, np.float32)[:, None, None]
    found = {
        "pixels": _distance(pixels[0] * std * 255, expected_pixels * std * 255),
        "image": _length(runtime.encode(pixels)[0] - embedding),
        "text": _length(runtime.embed_texts(texts) - text_embeddings),
        "scores": _score_distance(runtime, image, pixels, texts),
    }
    if manifest.prior is not None:
        expected_gradient = arrays.get("prior_gradient", 1, (manifest.embed_dim,))
        found["prior"] = _prior_distance(runtime, manifest.prior, embedding, expected_gradient)
    limits = {"image": TOLERANCE[runtime.precision], "text": TOLERANCE[runtime.text_precision]}
    limits |= {"pixels": PIXEL_TOLERANCE, "scores": SCORE_TOLERANCE, "prior": PRIOR_TOLERANCE}
    for name, difference in found.items():
        if not difference <= limits[name]:
            raise BundleError(
                f"{runtime.bundle.path}: golden {name} differ by {difference:.3g} on "
                f"{runtime.device}, more than {limits[name]:.3g}: do not use this bundle here"
            )
    return found


class _Arrays:
    def __init__(self, runtime: Runtime) -> None:
        self._arrays = runtime.bundle.golden()
        self._path = runtime.bundle.path / GOLDEN

    def get(self, name: str, ndim: int, ending: tuple[int, ...] = ()) -> NDArray[Any]:
        """One array, whose last sizes are `ending`. Raises BundleError."""
        array = self._arrays.get(name)
        if array is None or array.ndim != ndim or array.shape[ndim - len(ending) :] != ending:
            raise BundleError(f"{self._path} has no array {name!r} of the right shape")
        return array


def _score_distance(
    runtime: Runtime,
    image: NDArray[np.uint8],
    pixels: NDArray[np.float32],
    texts: list[str],
) -> float:
    """How far `classify` without purification is from the softmax of the runtime's own embeddings."""
    (embedding,) = runtime.encode(pixels)
    logits = runtime.bundle.manifest.logit_scale * runtime.embed_texts(texts) @ embedding
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    labels = [Label(text, (text,)) for text in texts]
    found = np.empty_like(expected)
    for prediction in runtime.classify(image, labels, top_k=len(labels)):
        found[prediction.index] = prediction.score
    return _distance(found, expected)


def _prior_distance(
    runtime: Runtime,
    spec: PriorSpec,
    embedding: NDArray[np.float32],
    expected: NDArray[np.float32],
) -> float:
    """How far the gradient of the bundle's prior is from the golden one, relative to its norm."""
    dim = len(embedding)
    prior = Prior(runtime.bundle.graph(spec.file), dim, device=runtime.onnx_device)
    (noise,) = DiffPurifier(steps=1).draws(dim)[1]
    _, (gradient,) = prior.loss_and_grad(embedding[None], spec.timesteps // 2, noise)
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


def _length(rows: NDArray[np.float32]) -> float:
    """The largest."""
    return float(np.linalg.norm(rows, axis=-1).max())


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())
