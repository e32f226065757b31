"""Golden check of a whole Runtime: preprocessing, tokens, encoders, scores and prior."""

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

PIXEL_TOLERANCE = 1.0  # in 1/255: versions of Pillow resize differently
PRIOR_TOLERANCE = 1e-3  # relative to the norm of the gradient
SCORE_TOLERANCE = 1e-2  # in probability: the logit scale, up to 100, amplifies differences


def check(runtime: Runtime) -> dict[str, float]:
    """Return the largest differences of pixels (in 1/255), embeddings (distance), scores and prior.

    Raises BundleError if a difference is above its tolerance, token ids differ, or golden.npz is
    malformed, see GoldenValues.
    """
    manifest, bundle = runtime.bundle.manifest, runtime.bundle
    golden = GoldenValues(bundle)
    if not np.array_equal(runtime.tokenize(golden.prompts), golden.ids):
        raise BundleError(
            f"{bundle.path}: token ids differ from the golden ids: export the bundle again"
        )

    pixels = runtime.preprocess([golden.image])
    std = np.asarray(manifest.image.std, np.float32)[:, None, None]
    texts = runtime.embed_texts(golden.prompts)
    differences = {
        "pixels": _distance(pixels[0] * std * 255, golden.pixels * std * 255),
        "image": largest_distance(runtime.encode(pixels)[0], golden.embedding),
        "text": largest_distance(texts, golden.text_embeddings),
        "scores": _score_distance(runtime, golden, pixels),
    }
    if manifest.prior is not None:
        differences["prior"] = _prior_distance(runtime, manifest.prior, golden)
    limits = {
        "image": embedding_limit(manifest, runtime.precision, "image"),
        "text": embedding_limit(manifest, runtime.text_precision, "text"),
        "pixels": PIXEL_TOLERANCE,
        "scores": SCORE_TOLERANCE,
        "prior": PRIOR_TOLERANCE,
    }
    for name, difference in differences.items():
        if not difference <= limits[name]:
            raise BundleError(
                f"{bundle.path}: golden {name} differ by {difference:.3g} on "
                f"{runtime.device}, more than {limits[name]:.3g}: do not use {runtime.precision} here"
            )
    return differences


def _score_distance(
    runtime: Runtime,
    golden: GoldenValues,
    pixels: NDArray[np.float32],
) -> float:
    """Return how far the scores of `classify` are from the softmax of the runtime's embeddings."""
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
    """Return the distance of the prior's gradient from the golden one, relative to its norm."""
    dim = len(golden.embedding)
    prior = Prior(runtime.bundle.graph(spec.file), dim, device=runtime.onnx_device)
    (noise,) = DiffPurifier(steps=1).draws(dim)[1]
    rows = golden.embedding[None]
    _, (gradient,) = prior.loss_and_grad(rows, spec.timesteps // 2, noise)
    expected = golden.prior_gradient
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


def _distance(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(actual - expected).max())
