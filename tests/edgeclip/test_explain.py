"""Explanations: the map against the one that training uses, and the picture made of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

import edgeclip
from edgeclip import BundleError, EdgeclipError, ImageError, LabelError, Runtime
from edgeclip.explain import (
    COLOURS,
    TILE,
    Explanation,
    attention_map,
    distance,
    picture_format,
    render,
)
from edgeclip.images.decoding import decode
from tests.support.models.export_models import exported
from tests.support.paths import EXAMPLES, GARMENTS, VECTORS
from train.attention import attention_map as trained_attention

BOOT = EXAMPLES / "ankle-boot.png"


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def published(
    tokens: np.ndarray, text: np.ndarray, grid: tuple[int, int], prefix: int, size: tuple[int, int]
) -> np.ndarray:
    """Compute the published map in PyTorch, in float64, for any grid and prefix."""
    exact = torch.from_numpy(tokens).double()
    scores = (exact / exact.norm(dim=0))[prefix:] @ torch.from_numpy(text).double()
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    return F.interpolate(scores.reshape(1, 1, *grid), size=size, mode="bilinear")[0, 0].numpy()


@pytest.mark.parametrize("kind", ["adv_target", "clean_original", "clean_target"])
def test_map_is_the_published_one(kind: str) -> None:
    with np.load(VECTORS / "tga_losses.npz") as golden:
        tokens, maps = golden[f"tokens_{kind}"], golden[f"map_{kind}"]
        texts, size = golden["text"][golden["labels"]], int(golden["image_size"])
    grid = round((tokens.shape[1] - 1) ** 0.5)
    for row, text, expected in zip(tokens, texts, maps, strict=True):
        found = attention_map(row, text, (grid, grid), 1, (size, size))
        np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [2, 7, 16])
@pytest.mark.parametrize("size", [1, 5, 28, 224])
def test_map_is_the_one_of_training(rng: np.random.Generator, grid: int, size: int) -> None:
    tokens = rng.normal(size=(1 + grid * grid, 48)).astype(np.float32)
    text = unit(rng.normal(size=48)).astype(np.float32)
    expected = trained_attention(
        torch.from_numpy(tokens[None]).double(), torch.from_numpy(text[None]).double(), size
    )
    found = attention_map(tokens, text, (grid, grid), 1, (size, size))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("grid", "size"), [((1, 7), (32, 96)), ((3, 5), (31, 53)), ((2, 1), (9, 1)), ((9, 4), (4, 9))]
)
def test_awkward_grids_and_prefixes(
    rng: np.random.Generator, grid: tuple[int, int], size: tuple[int, int], prefix: int
) -> None:
    tokens = rng.normal(size=(prefix + grid[0] * grid[1], 6)).astype(np.float32)
    text = unit(rng.normal(size=6)).astype(np.float32)
    found = attention_map(tokens, text, grid, prefix, size)
    np.testing.assert_allclose(
        found, published(tokens, text, grid, prefix, size), rtol=1e-5, atol=1e-6
    )
    assert found.shape == size
    assert found.min() >= 0
    assert found.max() <= 1


def test_no_attention_where_all_patches_are_alike(rng: np.random.Generator) -> None:
    text = unit(rng.normal(size=512)).astype(np.float32)
    alike = np.repeat(rng.normal(size=(1, 512)), 50, axis=0).astype(np.float32)
    one = rng.normal(size=(2, 512)).astype(np.float32)
    for tokens, grid in ((alike, (7, 7)), (0 * alike, (7, 7)), (one, (1, 1))):
        found = attention_map(tokens, text, grid, 1, (28, 20))
        np.testing.assert_array_equal(found, np.zeros((28, 20)))


def test_features_that_are_always_zero_say_nothing(rng: np.random.Generator) -> None:
    tokens = rng.normal(size=(10, 6)).astype(np.float32)
    tokens[:, 2] = 0
    text = unit(rng.normal(size=6)).astype(np.float32)
    kept = [0, 1, 3, 4, 5]
    expected = attention_map(tokens[:, kept], text[kept], (3, 3), 1, (9, 9))
    np.testing.assert_allclose(attention_map(tokens, text, (3, 3), 1, (9, 9)), expected, atol=1e-6)


def test_tokens_that_do_not_fit_are_refused() -> None:
    tokens, text = np.ones((10, 6), np.float32), np.ones(6, np.float32)
    for bad in ((tokens[:9], text), (tokens, text[:5]), (tokens[None], text)):
        with pytest.raises(ValueError, match=r"expected tokens \(1 \+ 3 \* 3, D\)"):
            attention_map(*bad, (3, 3), 1, (9, 9))


def test_embedded_bundle(rt: Runtime) -> None:
    found = rt.explain(BOOT, "ankle boot")
    assert isinstance(found, Explanation)
    assert found.label == "ankle boot"
    text = rt.labels(["ankle boot"]).embeddings
    pixels = rt.preprocess([BOOT])
    tokens = rt._host.tokens(pixels)
    expected = trained_attention(torch.from_numpy(tokens), torch.from_numpy(text.copy()), 28)
    np.testing.assert_allclose(found.attention, expected[0, 0], rtol=1e-4, atol=1e-5)
    assert found.attention.dtype == np.float32
    assert found.similarity == pytest.approx(float(rt.encode(pixels)[0] @ text[0]), abs=1e-6)
    # An image of the encoder's size is what the encoder sees.
    np.testing.assert_array_equal(found.image, decode(BOOT))


def test_every_source_label_and_template(rt: Runtime) -> None:
    found = rt.explain(BOOT.read_bytes(), "bag", templates=["my {}"])
    label = edgeclip.Label("x", ("my bag",))
    worded = rt.explain(decode(BOOT), label)
    assert worded.label == "x"
    np.testing.assert_array_equal(found.attention, worded.attention)
    assert not np.array_equal(found.attention, rt.explain(BOOT, "bag").attention)


def test_purification_changes_nothing(rt: Runtime) -> None:
    purified = Runtime("garments", purify="cos", precision="fp32").explain(BOOT, "bag")
    assert purified.similarity == pytest.approx(rt.explain(BOOT, "bag").similarity)


def test_grid_that_is_not_square() -> None:
    made = exported("vit-avg")
    runtime = Runtime(made.bundle)
    picture = Image.fromarray(decode(EXAMPLES / "coloured-dress.jpg")).resize((90, 50))
    found = runtime.explain(picture, "a dress")
    pixels = runtime.preprocess([picture])
    text = runtime.labels(["a dress"]).embeddings[0].copy()
    with torch.no_grad():
        visual = copy.copy(made.source.model.visual)  # which others use, without tokens
        visual.output_tokens = True
        tokens = (visual(torch.from_numpy(pixels))[1] @ visual.proj).numpy()[0]
    expected = published(tokens, text, (2, 3), 0, (32, 48))
    np.testing.assert_allclose(found.attention, expected, atol=1e-3)
    assert found.image.shape == (32, 48, 3)
    spec = made.bundle.manifest.image
    again = (found.image / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(again, pixels[0].transpose(1, 2, 0), atol=0.51 / 255 / 0.2)


def test_feature_map_of_a_convolutional_tower() -> None:
    made = exported("efficientnet")
    runtime, model = Runtime(made.bundle), made.source.model
    found = runtime.explain(EXAMPLES / "coloured-dress.jpg", "a dress")
    pixels = torch.from_numpy(runtime.preprocess([EXAMPLES / "coloured-dress.jpg"]))
    text = torch.from_numpy(runtime.labels(["a dress"]).embeddings.copy())
    with torch.no_grad():
        features = model.visual.trunk.forward_features(pixels)
        tokens = model.visual.head(features.flatten(2).mT)
        expected = trained_attention(tokens, text, 193, prefix=0)[0, 0]
    assert features.shape[2:] == (7, 7)
    assert found.attention.shape == (193, 193)
    np.testing.assert_allclose(found.attention, expected, atol=1e-3)
    assert (found.attention.min(), found.attention.max()) == pytest.approx((0, 1), abs=0.1)
    unit_embedding = model.encode_image(pixels, normalize=True)[0]
    assert found.similarity == pytest.approx(float(unit_embedding @ text[0]), abs=1e-5)


def changed(folder: Path, tokens: dict[str, object] | None) -> Path:
    """Copy the bundle garments with another entry for its tokens."""
    bundle = Path(shutil.copytree(GARMENTS, folder / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"tokens": tokens}))
    return bundle


def test_bundle_without_tokens(tmp_path: Path) -> None:
    runtime = Runtime(changed(tmp_path, None))
    with pytest.raises(BundleError, match=r"encoder has no patch tokens: export a ViT, or a conv"):
        runtime.explain(BOOT, "bag")


@pytest.mark.parametrize("tokens", [{"grid": [7, 8], "prefix": 1}, {"grid": [7, 7], "prefix": 0}])
def test_tokens_that_are_not_the_manifests(tmp_path: Path, tokens: dict[str, object]) -> None:
    runtime = Runtime(changed(tmp_path, tokens))
    with pytest.raises(BundleError, match=r"tokens \(50, 128\), which is not what the manifest"):
        runtime.explain(BOOT, "bag")


def test_bad_arguments(rt: Runtime) -> None:
    with pytest.raises(ImageError, match="no such file"):
        rt.explain("none.png", "bag")
    with pytest.raises(LabelError, match="is empty"):
        rt.explain(BOOT, " ")
    with pytest.raises(LabelError, match=r"has no \{\}"):
        rt.explain(BOOT, "bag", templates=["bag"])
    with pytest.raises(TypeError, match="expected a path"):
        rt.explain([BOOT], "bag")


def example(height: int = 28, width: int = 28, level: float = 0.5, label: str = "x") -> Explanation:
    return Explanation(
        label=label,
        attention=np.full((height, width), level, np.float32),
        image=np.full((height, width, 3), 128, np.uint8),
        similarity=0.5,
    )


def test_distance_is_over_all_pixels() -> None:
    assert distance(example(level=0.25), example(level=0.75)) == pytest.approx(14)
    with pytest.raises(ValueError, match="expected maps of one size"):
        distance(example(), example(28, 29))


def test_picture_of_one_image(rt: Runtime) -> None:
    found = rt.explain(BOOT, "ankle boot")
    picture = render([found])
    assert picture.mode == "RGB"
    assert picture.width >= 3 * TILE
    tile = np.asarray(picture)[42 : 42 + 336, 16 : 16 + 336]
    np.testing.assert_array_equal(tile[::12, ::12], found.image)  # its pixels are squares
    np.testing.assert_array_equal(tile[11::12, 11::12], found.image)


def test_picture_of_a_pair_shows_the_difference() -> None:
    pair = [example(level=0.25), example(level=0.25)]
    same = render(pair)
    apart = render([pair[0], example(level=1.0)])
    assert same.size == apart.size
    assert same.width > render(pair[:1]).width
    left, _, right, _ = ImageChops.difference(same, apart).getbbox()
    assert left > TILE  # the images themselves are the same
    tile = (right - TILE // 2, same.height // 2)
    assert same.getpixel(tile) == tuple(COLOURS[0])
    assert apart.getpixel(tile) == tuple(COLOURS[3])  # at 0.75 of the scale


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (32, 48), (400, 300)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_picture_of_any_size(size: tuple[int, int], count: int) -> None:
    picture = render([example(*size)] * count)
    assert picture.height > count * size[0]
    assert picture.width > 3 * size[1]


@pytest.mark.parametrize(
    "label", ["x" * 5000, "two\nlines\tand more", "Stiefel für Männer", "靴 👢"]
)
def test_any_label_fits_into_the_picture(label: str) -> None:
    assert render([example(label=label)]).size == render([example()]).size


def test_flat_maps_are_drawn_without_warning(rt: Runtime) -> None:
    flat = dataclasses.replace(rt.explain(BOOT, "bag"), attention=np.zeros((28, 28), np.float32))
    render([flat, flat])


def test_pictures_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="0 explanations"):
        render([])
    with pytest.raises(ValueError, match="1 captions"):
        render([example()] * 2, ["clean"])
    with pytest.raises(ValueError, match="of one size"):
        render([example(), example(29)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.b/c.JPG", "JPEG"), ("a.webp", "WEBP"), ("a.pdf", "PDF")],
)
def test_kinds_of_picture(name: str, kind: str) -> None:
    assert picture_format(name) == kind


@pytest.mark.parametrize("name", ["a", "a.txt", "a.psd", "a.xbm", "a.blp", ".png", "a.png/", ""])
def test_kinds_that_cannot_be_written(name: str) -> None:
    with pytest.raises(EdgeclipError, match=r"cannot write images of the kind .*; try \.png"):
        picture_format(name)


def test_explaining_never_loads_torch_and_classifying_no_fonts(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from edgeclip.cli.main import main
bundle = ["--bundle", "garments", "--label", "bag"]
assert main(["classify", {str(BOOT)!r}, *bundle]) == 0
assert not {{"edgeclip.explain", "PIL.ImageFont"}} & set(sys.modules)
sys.exit(main(["explain", {str(BOOT)!r}, *bundle, "-o", "out.png"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
