"""_core.preprocess against Pillow, torchvision and open_clip.

Since version 13 Pillow resizes vertically first where that shrinks the height much more than the
width, which moves some pixels by a few levels. So does edgeclip. The reference here makes the two
passes one by one, in that order: the same pixels with every version of Pillow.
"""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as PILLOW

from edgeclip import _core

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
pillow_resize = Image.Image.resize
MODES = ("shortest", "longest", "squash")


def two_passes(picture: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Image.resize of Pillow 13, whatever the version installed."""
    width, height = size
    vertical = max(0, 2 * (picture.width - width)) < picture.height - height
    between = (picture.width, height) if vertical else (width, picture.height)
    return pillow_resize(pillow_resize(picture, between, resample), size, resample)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image: np.ndarray, target: tuple[int, int], **options) -> np.ndarray:
    """What the operation computes before the normalisation, uint8 (h, w, 3)."""
    out = np.full((3, *target), np.nan, np.float32)
    _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), **options)
    values = out * np.float32(255)
    assert np.abs(values - np.rint(values)).max() < 1e-3
    return np.rint(values).astype(np.uint8).transpose(1, 2, 0)


def resized_size(height: int, width: int, target: tuple[int, int], mode: str) -> tuple[int, int]:
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        size, short, long = target[0], min(height, width), max(height, width)
        other = int(size * long / short)
        return (other, size) if width <= height else (size, other)
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def pillow_pixels(
    image: np.ndarray, target: tuple[int, int], resize: str, interpolation: str, fill: int = 0
) -> np.ndarray:
    size = resized_size(*image.shape[:2], target, resize)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = np.asarray(two_passes(picture, size[::-1], FILTERS[interpolation]))
    out = np.full((*target, 3), fill, np.uint8)
    source, place = [], []
    for length, wanted in zip(size, target, strict=True):
        first = round((length - wanted) / 2) if length > wanted else 0
        pad = (wanted - length) // 2 if length < wanted else 0
        count = min(length, wanted)
        source.append(slice(first, first + count))
        place.append(slice(pad, pad + count))
    out[tuple(place)] = resized[tuple(source)]
    return out


SIZES = [(1, 1), (2, 3), (7, 5), (33, 33), (32, 33), (33, 100), (2049, 33), (97, 2049), (640, 481)]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [(1, 1), (32, 32), (33, 33), (24, 41), (67, 30)])
def test_pixels_are_pillows(mode: str, interpolation: str, target: tuple[int, int]) -> None:
    for seed, size in enumerate(SIZES):
        image = random_image(*size, seed=seed)
        got = pixels(image, target, resize=mode, interpolation=interpolation, fill=7)
        expected = pillow_pixels(image, target, mode, interpolation, fill=7)
        np.testing.assert_array_equal(got, expected, err_msg=str(size))


def test_pixels_are_pillows_for_many_random_sizes() -> None:
    rng = np.random.default_rng(1)
    for case in range(150):
        height, width, *target = (int(side) for side in rng.integers(1, 90, 4))
        mode = MODES[case % 3]
        interpolation = list(FILTERS)[case % 2]
        if mode == "shortest" and max(height, width) > 30 * min(height, width):
            continue  # Pillow would need a very large picture
        image = random_image(height, width, seed=case)
        got = pixels(image, tuple(target), resize=mode, interpolation=interpolation)
        expected = pillow_pixels(image, tuple(target), mode, interpolation)
        np.testing.assert_array_equal(got, expected, err_msg=f"{case}: {image.shape} {target}")


PORTRAITS = [(40, 30), (80, 30), (90, 30), (300, 30), (71, 24)]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(30, 40), (100, 100), (30, 300), *PORTRAITS])
def test_pixels_are_those_of_a_single_resize(
    size: tuple[int, int], mode: str, interpolation: str
) -> None:
    if size in PORTRAITS and int(PILLOW.partition(".")[0]) < 13:
        pytest.skip("Pillow resizes vertically first since version 13")
    image = random_image(*size)
    height, width = resized_size(*size, (24, 24), mode)
    resized = Image.fromarray(image).resize((width, height), FILTERS[interpolation])
    expected = pillow_pixels(np.asarray(resized), (24, 24), "shortest", interpolation)
    got = pixels(image, (24, 24), resize=mode, interpolation=interpolation)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("extreme", [0, 255])
def test_overshoot_is_clipped(extreme: int) -> None:
    image = np.full((40, 40, 3), extreme, np.uint8)
    image[::2, 10:30:3] = 255 - extreme
    for target in [(224, 224), (17, 17)]:
        expected = pillow_pixels(image, target, "squash", "bicubic")
        np.testing.assert_array_equal(pixels(image, target, resize="squash"), expected)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000)])
@pytest.mark.parametrize("mode", MODES)
def test_thin_images(size: tuple[int, int], mode: str) -> None:
    image = random_image(*size)
    for interpolation in FILTERS:
        got = pixels(image, (16, 16), resize=mode, interpolation=interpolation, fill=3)
        expected = pillow_pixels(image, (16, 16), mode, interpolation, fill=3)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000)])
def test_only_what_the_crop_needs_is_computed(size: tuple[int, int]) -> None:
    image = random_image(*size)
    kibibytes = 1 if sys.platform != "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = pixels(image, (224, 224))  # of a resized 4480000 x 224, gigabytes if it were whole
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / kibibytes
    assert grown < 50_000
    middle = image.reshape(-1, 3)[9998:10002].astype(int)
    assert np.all(got >= np.clip(middle.min(0) - 64, 0, 255))
    assert np.all(got <= np.clip(middle.max(0) + 64, 0, 255))
    # At the middle of a pixel that is 224 wide, and of a crop that is 224 wide, an edge.
    edges = got if size[1] == 1 else got.transpose(1, 0, 2)
    assert np.all(edges == edges[:, :1])
    near = np.abs(edges[0, 0].astype(int) - image.reshape(-1, 3)[9999])
    far = np.abs(edges[-1, 0].astype(int) - image.reshape(-1, 3)[10000])
    assert max(near.max(), far.max()) <= 2


STRIDED = {
    "flipped rows": lambda a: a[::-1],
    "flipped columns": lambda a: a[:, ::-1],
    "flipped channels": lambda a: a[:, :, ::-1],
    "all flipped": lambda a: a[::-1, ::-1, ::-1],
    "every other": lambda a: a[::2, 1::3],
    "cropped": lambda a: a[5:60, 7:50],
    "transposed": lambda a: a.transpose(1, 0, 2),
    "Fortran order": np.asfortranarray,
    "planar": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "RGB of RGBA": lambda a: np.dstack([a, a[:, :, :1]])[:, :, :3],
    "grey": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "one row repeated": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name: str) -> None:
    image = STRIDED[name](random_image(70, 91))
    for mode in MODES:
        expected = pixels(np.array(image, order="C"), (32, 32), resize=mode)
        np.testing.assert_array_equal(pixels(image, (32, 32), resize=mode), expected)


def test_a_read_only_image_is_read() -> None:
    image = random_image(40, 40)
    expected = pixels(image, (32, 32))
    image.setflags(write=False)
    np.testing.assert_array_equal(pixels(image, (32, 32)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (333, 250)])
def test_threads_do_not_change_the_result(mode: str, size: tuple[int, int]) -> None:
    image = random_image(*size)
    results = []
    for threads in (0, 1, 2, 5, 1000):
        out = np.empty((3, 37, 41), np.float32)
        _core.preprocess(image, out, mean=OPENAI_MEAN, std=OPENAI_STD, resize=mode, threads=threads)
        results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_after_a_fork() -> None:
    """The threads that are kept are the parent's: a child has to start its own."""
    code = """
import os, numpy as np
from edgeclip import _core
def pixels():
    image = np.arange(300 * 200 * 3, dtype=np.uint8).reshape(300, 200, 3)
    out = np.zeros((3, 50, 50), np.float32)
    _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), threads=4)
    return out
expected = pixels()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(pixels(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(pixels(), expected)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_writes_one_row_of_a_batch_only() -> None:
    batch = np.full((3, 3, 16, 16), -7, np.float32)
    _core.preprocess(random_image(20, 30), batch[1], mean=(0, 0, 0), std=(1, 1, 1))
    assert np.all(batch[[0, 2]] == -7)
    assert batch[1].min() >= 0


@pytest.mark.parametrize("fill", [0, 128, 255])
def test_padding_is_normalised(fill: int) -> None:
    out = np.empty((3, 8, 8), np.float32)
    _core.preprocess(
        random_image(4, 8), out, mean=OPENAI_MEAN, std=OPENAI_STD, resize="longest", fill=fill
    )
    for channel in range(3):
        value = np.float32(fill) / np.float32(255)
        value = (value - np.float32(OPENAI_MEAN[channel])) / np.float32(OPENAI_STD[channel])
        assert np.all(out[channel, [0, 1, 6, 7]] == value)


@pytest.mark.parametrize(
    ("target", "mode", "interpolation"),
    [
        case
        for case in itertools.product([32, (24, 41)], MODES, FILTERS)
        if case != ((24, 41), "shortest", "bilinear")  # where open_clip is bicubic all the same
    ],
)
def test_equals_open_clip(
    target: int | tuple[int, int],
    mode: str,
    interpolation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from open_clip import transform

    monkeypatch.setattr(Image.Image, "resize", two_passes)
    reference = transform.image_transform(
        target,
        is_train=False,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        resize_mode=mode,
        interpolation=interpolation,
        fill_color=9,
    )
    for size in [(1, 1), (33, 33), (31, 64), (200, 99), (480, 640)]:
        image = random_image(*size)
        shape = (target, target) if isinstance(target, int) else target
        out = np.empty((3, *shape), np.float32)
        _core.preprocess(
            image,
            out,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
            resize=mode,
            interpolation=interpolation,
            fill=9,
        )
        np.testing.assert_array_equal(out, reference(Image.fromarray(image)).numpy())


GOOD = {"image": random_image(4, 5), "out": np.zeros((3, 2, 2), np.float32)}


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def misaligned(shape: tuple[int, ...]) -> np.ndarray:
    size = 4 * int(np.prod(shape))
    return np.zeros(size + 4, np.uint8)[1 : size + 1].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": np.zeros((4, 5, 4), np.uint8)},
            "expected image (H, W, 3) uint8, got (4, 5, 4) uint8",
        ),
        (
            {"image": np.zeros((4, 5, 3), np.float32)},
            "expected image (H, W, 3) uint8, got (4, 5, 3) float32",
        ),
        ({"image": np.zeros((4, 5), np.uint8)}, "expected image (H, W, 3) uint8, got (4, 5) uint8"),
        (
            {"image": np.zeros((0, 5, 3), np.uint8)},
            "expected sides of 1 to 2147483647 pixels, got image (0, 5, 3) and out (3, 2, 2)",
        ),
        (
            {"out": np.zeros((3, 2, 0), np.float32)},
            "expected sides of 1 to 2147483647 pixels, got image (4, 5, 3) and out (3, 2, 0)",
        ),
        (
            {"out": np.zeros((3, 2, 2), np.float16)},
            "expected out (3, h, w) float32, got (3, 2, 2) float16",
        ),
        (
            {"out": np.zeros((2, 2, 3), np.float32)},
            "expected out (3, h, w) float32, got (2, 2, 3) float32",
        ),
        (
            {"out": np.zeros((3, 2, 2), ">f4")},
            "expected out (3, h, w) float32, got (3, 2, 2) float32 (byte-swapped)",
        ),
        (
            {"out": np.zeros((2, 2, 3), np.float32).transpose(2, 0, 1)},
            "expected out to be C-contiguous, got strides (4, 24, 12) for shape (3, 2, 2)",
        ),
        ({"out": misaligned((3, 2, 2))}, "expected out to be aligned to its element size"),
        ({"out": read_only(GOOD["out"])}, "expected out to be writable"),
        ({"mean": (0, 0)}, "expected mean of 3 values, got 2"),
        ({"std": (1, 1, 1, 1)}, "expected std of 3 values, got 4"),
        ({"std": (1, 0, 1)}, "expected nonzero std"),
        ({"std": (1, float("nan"), 1)}, "expected finite std"),
        ({"mean": (0, float("inf"), 0)}, "expected finite mean"),
        ({"fill": 256}, "expected fill in 0..255, got 256"),
        ({"fill": -1}, "expected fill in 0..255, got -1"),
        ({"threads": -1}, "expected threads >= 0, got -1"),
        ({"resize": "fit"}, "expected resize 'shortest', 'longest' or 'squash', got 'fit'"),
        (
            {"interpolation": "nearest"},
            "expected interpolation 'bicubic' or 'bilinear', got 'nearest'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    arguments = {**GOOD, "mean": (0, 0, 0), "std": (1, 1, 1), **change}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        _core.preprocess(arguments.pop("image"), arguments.pop("out"), **arguments)
    assert str(error.value) == "[preprocess] " + message


def test_all_named_options_are_accepted() -> None:
    for resize in _core.RESIZES:
        for interpolation in _core.INTERPOLATIONS:
            out = np.full_like(GOOD["out"], np.nan)
            _core.preprocess(
                GOOD["image"],
                out,
                mean=(0, 0, 0),
                std=(1, 1, 1),
                resize=resize,
                interpolation=interpolation,
            )
            assert np.isfinite(out).all()


def test_lists_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"\[preprocess\] expected image to be a NumPy array, .* got list"
    ):
        _core.preprocess([[1]], GOOD["out"], mean=(0, 0, 0), std=(1, 1, 1))
