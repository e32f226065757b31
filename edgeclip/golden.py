"""The golden check: does this machine compute what the source model computed at export?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError
from edgeclip.runtime import Runtime

# Largest difference between unit embeddings, by precision. Of pixels: one step of 8 bits, since
# the export's reference is Pillow, which is also what `preprocess` is tested to equal.
TOLERANCE = {"fp32": 1e-4}


def check(runtime: Runtime) -> dict[str, float]:
    """The largest differences of pixels (in 1/255), image and text embeddings from the golden ones.

    Raises BundleError where one is above its tolerance, or token ids differ.
    """
    manifest = runtime.bundle.manifest
    golden = runtime.bundle.golden()
    pixels = runtime.preprocess([golden["image"]])
    std = np.asarray(manifest.image.std, np.float32)[:, None, None]
    texts = [str(text) for text in golden["prompts"]]
    found = {
        "pixels": float(np.abs((pixels[0] - golden["pixels"]) * std).max() * 255),
        "image": _distance(runtime.encode(pixels)[0], golden["embedding"]),
        "text": _distance(runtime.embed_texts(texts), golden["text_embeddings"]),
    }
    if not np.array_equal(runtime.tokenize(texts), golden["ids"]):
        raise BundleError(f"{runtime.bundle.path}: token ids differ from the golden ones")
    limits = {"pixels": 1.0, "image": TOLERANCE[runtime.precision]}
    limits["text"] = limits["image"]
    for name, difference in found.items():
        if not difference <= limits[name]:
            raise BundleError(
                f"{runtime.bundle.path}: golden {name} differ by {difference:.3g} on "
                f"{runtime.device}, more than {limits[name]:.3g}: do not use this bundle here"
            )
    return found


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max())
