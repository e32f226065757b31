"""The golden check of a whole Runtime: preprocessing, tokens, encoders, scores and prior."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeclip.backends.golden_values import GoldenValues, embedding_limit, largest_distance
from edgeclip.backends.prior import Prior
from edgeclip.errors import BundleError
from edgeclip.labels import LabelSet
from edgeclip.manifest import PriorSpec
from edgeclip.purify import DiffPurifier
from edgeclip.runtime import Runtime

PIXEL_TOLERANCE = 1.0  # steps of 8 bits: Pillow resized the golden image, of whatever version
PRIOR_TOLERANCE = 1e-3  # of a gradient, relative to its norm
SCORE_TOLERANCE = 1e-2  # of probabilities, whose logits are embeddings times a scale of up to 100


def check(runtime: Runtime) -> dict[str, float]:
    """Return the largest differences of pixels (in 1/255), embeddings (distance), scores and prior.

    Raises BundleError where a difference is above its tolerance, token ids differ, or golden.npz is
    not as GoldenValues says.
    """
    manifest, bundle = runtime.bundle.manifest, runtime.bundle
    golden = GoldenValues(bundle)
    if not np.array_equal(runtime.tokenize(golden.prompts), golden.ids):
        raise BundleError(f"{bundle.path}: token ids differ from the golden ones")

    pixels = runtime.preprocess([golden.image])
    std = np.asarray(manifest.image.std, np.float32)[:, None, None]
    texts = runtime.embed_texts(golden.prompts)
    found = {
        "pixels": _distance(pixels[0] * std * 255, golden.pixels * std * 255),
        "image": largest_distance(runtime.encode(pixels)[0], golden.embedding),
        "text": largest_distance(texts, golden.text_embeddings),
        "scores": _score_distance(runtime, golden, pixels),
    }
    if manifest.prior is not None:
        found["prior"] = _prior_distance(runtime, manifest.prior, golden)
    limits = {
        "image": embedding_limit(manifest, runtime.precision, "image"),
        "text": embedding_limit(manifest, runtime.text_precision, "text"),
        "pixels": PIXEL_TOLERANCE,
        "scores": SCORE_TOLERANCE,
        "prior": PRIOR_TOLERANCE,
    }
    for name, difference in found.items():
        if not difference <= limits[name]:
            raise BundleError(
                f"{bundle.path}: golden {name} differ by {difference:.3g} on "
                f"{runtime.device}, more than {limits[name]:.3g}: do not use {runtime.precision} here"
            )
    return found


def _score_distance(
    runtime: Runtime,
    golden: GoldenValues,
    pixels: NDArray[np.float32],
) -> float:
    """Return how far `classify` without purification is from the softmax of its own embeddings."""
    texts = golden.prompts
    (embedding,) = runtime.encode(pixels)
    rows = runtime.embed_texts(texts)
    logits = runtime.bundle.manifest.logit_scale * rows @ embedding
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    null_scores = rows @ runtime.bundle.null_text
    labels = LabelSet(tuple(texts), rows, null_scores, runtime.text_identity())
    return _distance(runtime.scores(golden.image, labels)[0], expected)


def _prior_distance(runtime: Runtime, spec: PriorSpec, golden: GoldenValues) -> float:
    """Return how far the gradient of the bundle's prior is from the golden one, relative to its norm."""
    dim = len(golden.embedding)
    prior = Prior(runtime.bundle.graph(spec.file), dim, device=runtime.onnx_device)
    (noise,) = DiffPurifier(steps=1).draws(dim)[1]
    rows = golden.embedding[None]
    _, (gradient,) = prior.loss_and_grad(rows, spec.timesteps // 2, noise)
    expected = golden.prior_gradient
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())
