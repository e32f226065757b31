"""Properties of _core.preprocess for any sizes: resizing, crop, padding, and refused shapes."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeclip import _core
from tests.support.preprocessing import (
    FILTERS,
    MODES,
    OPENAI_MEAN,
    OPENAI_STD,
    crop_or_pad,
    pillow_pixels,
    pixels,
    random_image,
    resized_size,
    two_passes,
)

properties = settings(max_examples=60, derandomize=True, deadline=None, database=None)
sides = st.integers(1, 64)
sizes = st.tuples(sides, sides)
targets = st.integers(1, 40).map(lambda side: (side, side)) | st.tuples(sides, sides)
modes = st.sampled_from(MODES)
filters = st.sampled_from(sorted(FILTERS))
fills = st.integers(0, 255)


@properties
@given(sizes, targets, modes, filters, fills)
@example((63, 64), (31, 32), "shortest", "bicubic", 0)  # a margin of an odd number of pixels
@example((1, 64), (7, 7), "longest", "bilinear", 9)  # a side that would be rounded to 0
@example((3, 5), (3, 5), "squash", "bicubic", 0)  # nothing to do
def test_pixels_equal_pillows(
    size: tuple[int, int], target: tuple[int, int], mode: str, interpolation: str, fill: int
) -> None:
    image = random_image(*size)
    got = pixels(image, target, resize=mode, interpolation=interpolation, fill=fill)
    np.testing.assert_array_equal(got, pillow_pixels(image, target, mode, interpolation, fill))


@properties
@given(sizes, targets, modes, filters, fills)
def test_values_equal_open_clips(
    size: tuple[int, int], target: tuple[int, int], mode: str, interpolation: str, fill: int
) -> None:
    """Check sizes against open_clip's and torchvision's code, not the rule written out."""
    from open_clip import transform

    # open_clip ignores the filter if the shortest side of a rectangle is to fit, and fails if the
    # longest is and the other rounds to 0.
    assume(mode != "shortest" or target[0] == target[1] or interpolation == "bicubic")
    ratio = max(size[0] / target[0], size[1] / target[1])
    assume(mode != "longest" or round(min(size) / ratio) > 0)
    image = random_image(*size)
    reference = transform.image_transform(
        target,
        is_train=False,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        resize_mode=mode,
        interpolation=interpolation,
        fill_color=fill,
    )
    with mock.patch.object(Image.Image, "resize", two_passes):
        expected = reference(Image.fromarray(image)).numpy()
    out = np.full((3, *target), np.nan, np.float32)
    _core.preprocess(
        image,
        out,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        resize=mode,
        interpolation=interpolation,
        fill=fill,
    )
    np.testing.assert_array_equal(out, expected)


@properties
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), targets, modes)
def test_padding_is_where_open_clip_pads(
    size: tuple[int, int], target: tuple[int, int], mode: str
) -> None:
    white = np.broadcast_to(np.uint8(255), (*size, 3))  # a view: no memory for large sizes
    expected = np.zeros((*target, 3), np.uint8)
    height, width = resized_size(*size, target, mode)
    expected[crop_or_pad(height, target[0])[1], crop_or_pad(width, target[1])[1]] = 255
    np.testing.assert_array_equal(pixels(white, target, resize=mode, fill=0), expected)


@properties
@given(sizes, targets, modes, st.sampled_from(["image", "out"]), st.integers(0, 1))
def test_an_empty_side_is_refused(
    size: tuple[int, int], target: tuple[int, int], mode: str, name: str, axis: int
) -> None:
    image_shape, out_shape = [*size, 3], [3, *target]
    if name == "image":
        image_shape[axis] = 0
    else:
        out_shape[1 + axis] = 0
    with pytest.raises(ValueError, match="expected sides of 1 to 2147483647 pixels"):
        _core.preprocess(
            np.zeros(image_shape, np.uint8),
            np.zeros(out_shape, np.float32),
            mean=(0, 0, 0),
            std=(1, 1, 1),
            resize=mode,
        )


@properties
@given(st.lists(st.integers(0, 5), max_size=5), st.sampled_from(["image", "out"]))
def test_a_wrong_shape_is_refused(shape: list[int], name: str) -> None:
    channels = {"image": 2, "out": 0}[name]
    assume(len(shape) != 3 or shape[channels] != 3)
    arrays = {"image": random_image(4, 5), "out": np.zeros((3, 2, 2), np.float32)}
    arrays[name] = np.zeros(shape, arrays[name].dtype)
    with pytest.raises(ValueError, match=rf"expected {name} \("):
        _core.preprocess(arrays["image"], arrays["out"], mean=(0, 0, 0), std=(1, 1, 1))
