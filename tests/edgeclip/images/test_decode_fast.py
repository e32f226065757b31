"""Fast decoding of JPEGs at a reduced scale: pixels and embeddings against exact decoding."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgeclip
from edgeclip import ImageError
from edgeclip.cli.main import main
from edgeclip.images.decoding import decode
from edgeclip.manifest import ImageSpec
from tests.support.commands import BUNDLE
from tests.support.data.image_files import encoded
from tests.support.paths import EXAMPLES

ORIENTATION = 0x0112
Runtimes = tuple[edgeclip.Runtime, edgeclip.Runtime]
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket"]


def spec(height: int, width: int, resize: str = "shortest") -> ImageSpec:
    return ImageSpec((height, width), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an image without detail, so that every scale has nearly the same contents."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def decoded_size(height: int, width: int, target: ImageSpec) -> tuple[int, ...]:
    return decode(encoded(smooth(height, width), "JPEG"), fast_for=target).shape[:2]


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        ((640, 640), spec(40, 40), 8),
        ((632, 640), spec(40, 40), 4),  # one block less than twice as large
        ((320, 640), spec(40, 40), 4),
        ((320, 640), spec(40, 40, "longest"), 8),
        ((320, 640), spec(40, 40, "squash"), 4),
        ((320, 640), spec(20, 40, "squash"), 8),
        ((160, 640), spec(40, 40), 2),
        ((152, 640), spec(40, 40), 1),
        ((40, 40), spec(40, 40), 1),
        ((8, 8), spec(40, 40), 1),
        ((1, 2048), spec(4, 4), 1),
        ((1, 2048), spec(1, 4, "longest"), 1),  # a single row is not scaled
        ((644, 644), spec(40, 40), 4),  # does not divide by 8
        ((642, 642), spec(40, 40), 2),
        ((641, 641), spec(40, 40), 2),  # moves the right edge by 1/16, within the limit
        ((640, 161), spec(40, 40), 1),  # would move the right edge by 1/4, too far
        ((20001, 17), spec(2, 2, "longest"), 8),
    ],
)
def test_the_scale(size: tuple[int, int], target: ImageSpec, scale: int) -> None:
    expected = tuple(-(-side // scale) for side in size)
    assert decoded_size(*size, target) == expected


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_picture_is_the_same(mode: str, options: dict, tmp_path: Path) -> None:
    data = encoded(smooth(320, 480).convert(mode), "JPEG", quality=95, **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    exact = decode(data)
    assert exact.shape == (320, 480, 3)
    averaged = exact.reshape(40, 8, 60, 8, 3).mean(axis=(1, 3))
    for source in (data, path, memoryview(data)):
        fast = decode(source, fast_for=spec(20, 20))
        assert np.abs(fast - averaged).max() < 4
    np.testing.assert_array_equal(decode(data, fast_for=spec(200, 200)), exact)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(smooth(320, 480), "JPEG", quality=95, exif=exif)
    exact = decode(data)
    turned = orientation >= 5
    assert exact.shape == ((480, 320, 3) if turned else (320, 480, 3))
    # The upright picture decides the scale: its other side for these two shapes.
    wide = decode(data, fast_for=spec(20, 30, "squash"))
    tall = decode(data, fast_for=spec(30, 20, "squash"))
    assert [wide.shape, tall.shape] == (
        [(120, 80, 3), (60, 40, 3)] if turned else [(40, 60, 3), (80, 120, 3)]
    )
    for fast in (wide, tall):
        scale = len(exact) // len(fast)
        averaged = exact.reshape(len(fast), scale, -1, scale, 3).mean(axis=(1, 3))
        assert np.abs(fast - averaged).max() < 4


def test_a_picture_of_several_frames() -> None:
    frames = [smooth(320, 480, seed) for seed in (0, 1)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    averaged = np.asarray(frames[0]).reshape(40, 8, 60, 8, 3).mean(axis=(1, 3))
    assert np.abs(decode(data, fast_for=spec(20, 20)) - averaged).max() < 4


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_other_formats_are_exact(form: str) -> None:
    data = encoded(smooth(320, 480), form)
    np.testing.assert_array_equal(decode(data, fast_for=spec(10, 10)), decode(data))


def test_decoded_images_of_the_caller_are_exact_and_unchanged(tmp_path: Path) -> None:
    smooth(320, 480).save(tmp_path / "a.jpg")
    array = decode(tmp_path / "a.jpg")
    assert decode(array, fast_for=spec(10, 10)) is array
    with Image.open(tmp_path / "a.jpg") as lazy:
        np.testing.assert_array_equal(decode(lazy, fast_for=spec(10, 10)), array)
        assert lazy.size == (480, 320)
        np.testing.assert_array_equal(np.asarray(lazy), array)


def test_the_limit_applies_to_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth(320, 480), "JPEG")
    monkeypatch.setattr("edgeclip.images.decoding.MAX_PIXELS", 320 * 480)
    assert decode(data, fast_for=spec(10, 10)).shape == (40, 60, 3)
    monkeypatch.setattr("edgeclip.images.decoding.MAX_PIXELS", 320 * 480 - 1)
    with pytest.raises(ImageError, match="more than 153,599 pixels"):
        decode(data, fast_for=spec(10, 10))


def test_truncated_files() -> None:
    data = encoded(smooth(320, 480), "JPEG")
    for length in (len(data) // 2, 300):
        with pytest.raises(ImageError, match="broken image"):
            decode(data[:length], fast_for=spec(10, 10))


def photograph(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(getattr(data, name)()[..., :3])


@pytest.fixture(scope="module")
def runtimes() -> Runtimes:
    """Return a Runtime with fast decoding and one with exact decoding."""
    kinds = ("fast", "exact")
    fast, exact = (
        edgeclip.Runtime("garments", purify="none", decode=kind, threads=1) for kind in kinds
    )
    return fast, exact


def check_embedding(
    runtimes: Runtimes, picture: Image.Image, blocks: int, **options: object
) -> None:
    """Compare fast and exact decoding at each scale, which leaves `blocks` times the encoder's size."""
    fast, exact = runtimes
    height, width = fast.bundle.manifest.image.size
    for scale in (2, 4, 8):
        size = scale * blocks * width, scale * blocks * height
        data = encoded(picture.resize(size, Image.Resampling.LANCZOS), "JPEG", **options)
        assert decode(data, fast_for=fast.bundle.manifest.image).shape[0] == size[1] // scale
        levels = [rt.preprocess([data]) * 127.5 for rt in (fast, exact)]
        difference = np.abs(levels[0] - levels[1])
        assert 0 < difference.mean() < 2
        assert difference.max() < 20
        assert float((fast.embed_images(data) @ exact.embed_images(data).T)[0, 0]) > 0.9995


@pytest.mark.parametrize(("quality", "subsampling"), [(95, 0), (75, 2)])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_embeddings_of_photographs(
    runtimes: Runtimes, name: str, quality: int, subsampling: int
) -> None:
    check_embedding(runtimes, photograph(name), 2, quality=quality, subsampling=subsampling)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("name", ["coloured-dress", "coloured-ankle-boot"])
def test_embeddings_of_garments(runtimes: Runtimes, name: str, subsampling: int) -> None:
    check_embedding(runtimes, Image.open(EXAMPLES / f"{name}.jpg"), 2, subsampling=subsampling)


@pytest.mark.parametrize("name", ["rocket", "retina"])
@pytest.mark.parametrize("edge", [1, 3, 7])
def test_embeddings_of_odd_sizes(runtimes: Runtimes, name: str, edge: int) -> None:
    """Check that the embedding hardly changes if the scale does not divide the size."""
    fast, exact = runtimes
    picture = photograph(name)
    for side in (112, 224, 448, 704):
        resized = picture.resize((side + edge, side + 10 * edge), Image.Resampling.LANCZOS)
        data = encoded(resized, "JPEG", quality=90)
        assert float((fast.embed_images(data) @ exact.embed_images(data).T)[0, 0]) > 0.999


def test_wrong_usage() -> None:
    with pytest.raises(ValueError, match="decode must be fast or exact, got 'quick'"):
        edgeclip.Runtime("garments", decode="quick")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (448, 448, 3), np.uint8)).save(path)

    def embedding(*options: str) -> list[float]:
        assert main(["embed", str(path), *BUNDLE, *options]) == 0
        values: list[float] = json.loads(capsys.readouterr().out)["embedding"]
        return values

    exact = embedding("--decode", "exact")
    assert embedding("--decode", "fast") == embedding() != exact
    pixels = decode(path)
    assert edgeclip.Runtime("garments", purify="none").embed_images(pixels)[0].tolist() == exact
    with pytest.raises(SystemExit, match="2"):
        main(["embed", str(path), "--decode", "quick"])
    assert "invalid choice: 'quick'" in capsys.readouterr().err


def test_every_row_of_a_picture_is_copied(rng: np.random.Generator) -> None:
    for height in (1, 63, 64, 65, 200):
        array = rng.integers(0, 256, (height, 3, 3), np.uint8)
        stored = io.BytesIO(encoded(Image.fromarray(array), "PNG"))
        np.testing.assert_array_equal(decode(stored.getvalue()), array)
