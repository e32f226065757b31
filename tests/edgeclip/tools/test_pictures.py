"""The pictures that golden values and measurements are made of."""

from __future__ import annotations

import numpy as np

from edgeclip.backends.golden_values import GoldenValues
from edgeclip.bundle import Bundle
from edgeclip.tools.pictures import golden_picture, picture


def test_the_embedded_bundle_has_the_golden_picture() -> None:
    """Compare with the file that an earlier version wrote; a sine may round differently elsewhere."""
    image = GoldenValues(Bundle("garments")).image
    drawn = golden_picture(*image.shape[:2])
    np.testing.assert_allclose(drawn.astype(int), image.astype(int), atol=1)
    assert drawn.std() > 30  # levels: there is something to see


def test_a_picture_is_always_the_same() -> None:
    first, second = picture(64, 48), picture(64, 48)
    assert first.size == (64, 48)
    assert first.tobytes() == second.tobytes()
