"""Text-guided attention as a picture: where in an image a bundle's encoder sees a label.

TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3.2: the map that its training holds
still under attack, here from the `tokens` output of the exported encoder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgeclip.drawing.captions import LINE, builtin_font, draw_captions
from edgeclip.errors import EdgeclipError
from edgeclip.storage import is_stream

if TYPE_CHECKING:
    from edgeclip.manifest import ImageSpec

# Scores are about 1 at most; of smaller differences float32 tokens tell nothing.
FLAT = 1e-7
TILE = 320  # pixels of a tile's longer side, at least
GAP = 16
# Black to pale yellow, evenly lighter: stops of matplotlib's inferno.
COLOURS = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where one image speaks for one label, and how much."""

    label: str
    attention: NDArray[np.float32]  # (H, W) in [0, 1], at the encoder's input size
    image: NDArray[np.uint8]  # (H, W, 3), what the encoder saw
    similarity: float  # cosine of the image's and the label's embeddings, before any purification


def attention_map(
    tokens: NDArray[np.float32],
    text: NDArray[np.float32],
    grid: tuple[int, int],
    prefix: int,
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """Attention to a text over an image, float32 (H, W) in [0, 1] with (H, W) = size.

    tokens: float (prefix + rows * columns, D), of the last block after ln_post and the projection,
    `prefix` class tokens before the patches of `grid`, rows and columns. text: unit (D,).
    Each patch's score is stretched to [0, 1], then interpolated between the patches' centres
    (TGA-ZSR, section 3.2). Where all patches score the same there is no attention: zeros.
    Raises ValueError for shapes that do not fit.
    """
    rows, columns = grid
    if tokens.ndim != 2 or len(tokens) != prefix + rows * columns or text.shape != tokens.shape[1:]:
        raise ValueError(
            f"[attention_map] expected tokens ({prefix} + {rows} * {columns}, D) and text (D,), "
            f"got {tokens.shape} and {text.shape}"
        )
    exact = tokens.astype(np.float64)
    # As published: the norm is that of each feature over the tokens, not of each token.
    norms = np.linalg.norm(exact, axis=0)
    scores = (exact[prefix:] / np.where(norms > 0, norms, 1)) @ text.astype(np.float64)
    low, high = scores.min(), scores.max()
    if high - low <= FLAT:
        return np.zeros(size, np.float32)
    patches = ((scores - low) / (high - low)).reshape(grid)
    down, across = _bilinear(size[0], rows), _bilinear(size[1], columns)
    found: NDArray[np.float32] = (down @ patches @ across.T).clip(0, 1).astype(np.float32)
    return found


def _bilinear(size: int, patches: int) -> NDArray[np.float64]:
    """Weights (size, patches) of linear interpolation between the patches' centres.

    As F.interpolate of PyTorch: corners are not aligned, and nothing is averaged in shrinking.
    """
    centres = (np.arange(size) + 0.5) * patches / size - 0.5
    distances = np.abs(centres.clip(0, patches - 1)[:, None] - np.arange(patches))
    weights: NDArray[np.float64] = (1 - distances).clip(0)
    return weights


def distance(a: Explanation, b: Explanation) -> float:
    """The l2 distance of two maps over all pixels: L_AR of TGA-ZSR, for one image.

    Raises ValueError for maps of two sizes.
    """
    return float(np.linalg.norm(_difference(a, b)))


def _difference(a: Explanation, b: Explanation) -> NDArray[np.float32]:
    if a.attention.shape != b.attention.shape:
        raise ValueError(
            f"[explain] expected maps of one size, got {a.attention.shape} and {b.attention.shape}"
        )
    found: NDArray[np.float32] = np.abs(a.attention - b.attention)
    return found


def as_picture(pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """What the encoder sees, float32 (3, H, W), as uint8 (H, W, 3)."""
    std, mean = np.asarray(spec.std, np.float32), np.asarray(spec.mean, np.float32)
    levels = (pixels.transpose(1, 2, 0) * std + mean) * 255
    picture: NDArray[np.uint8] = levels.round().clip(0, 255).astype(np.uint8)
    return picture


def render(
    explanations: Sequence[Explanation], captions: Sequence[str] | None = None
) -> Image.Image:
    """A picture for people: each image, its attention laid over it, and the attention alone.

    One row for each explanation, all of one size; captions name the images: by default "clean"
    and "attacked" for two, which also get the difference of their maps.
    Raises ValueError for no explanation, captions that are not as many, or several sizes.
    """
    count = len(explanations)
    if captions is None:
        captions = ("clean", "attacked") if count == 2 else ("image",) * count
    if not count or len(captions) != count:
        raise ValueError(f"[render] got {count} explanations and {len(captions)} captions")
    height, width = explanations[0].attention.shape
    factor = -(-TILE // max(height, width))  # a whole number, so that pixels stay squares
    size = width * factor, height * factor
    smooth = Image.Resampling.BICUBIC if factor < 4 else Image.Resampling.NEAREST
    tiles = []
    for row, (found, caption) in enumerate(zip(explanations, captions, strict=True)):
        if found.attention.shape != (height, width):
            raise ValueError("[render] expected explanations of one size")
        picture = Image.fromarray(found.image).resize(size, smooth)
        attention = _enlarge(found.attention, size)
        tiles += [
            _Tile(row, 0, f"{caption}, similarity {found.similarity:.3f}", picture),
            _Tile(row, 1, found.label, _overlay(picture, attention)),
            _Tile(row, 2, "attention", Image.fromarray(_colours(attention))),
        ]
    if count == 2:
        difference = _difference(*explanations)
        caption = f"difference, l2 {np.linalg.norm(difference):.2f}"
        heat = Image.fromarray(_colours(_enlarge(difference, size)))
        tiles.append(_Tile(0.5, 3, caption, heat))
    return _sheet(tiles)


def picture_format(path: str) -> str:
    """Return Pillow's name for the kind of image that a file name ends in.

    PNG for `-` and for pipes and devices without a suffix. Raises EdgeclipError.
    """
    suffix = os.path.splitext(path)[1].lower()
    if path == "-" or (not suffix and path and os.path.exists(path) and is_stream(path)):
        return "PNG"
    kind = Image.registered_extensions().get(suffix, "")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)  # some it only reads, or in grey only
    except (KeyError, OSError, ValueError) as err:
        raise EdgeclipError(
            f"{path}: cannot write images of the kind {suffix!r}; try .png"
        ) from err
    return kind


@dataclass(frozen=True)
class _Tile:
    row: float
    column: int
    caption: str
    image: Image.Image


def _sheet(tiles: Sequence[_Tile]) -> Image.Image:
    """Tiles of one size on white, each below its caption; below them all the scale of colours."""
    width, height = tiles[0].image.size
    right, down = width + GAP, LINE + height + GAP
    columns = 1 + max(tile.column for tile in tiles)
    rows = 1 + max(int(tile.row) for tile in tiles)
    sheet = Image.new("RGB", (GAP + columns * right, 2 * GAP + rows * down + LINE), "white")
    captions = draw_captions([tile.caption for tile in tiles], width)
    for tile, caption in zip(tiles, captions, strict=True):
        left, top = GAP + tile.column * right, GAP + round(tile.row * down)
        sheet.paste(caption, (left, top))
        sheet.paste(tile.image, (left, top + LINE))
    draw, font = ImageDraw.Draw(sheet), builtin_font()
    left, top = GAP + 2 * right, GAP + rows * down - 4
    draw.text((left, top), "0", "black", font)
    draw.text((left + width, top), "1", "black", font, anchor="ra")
    scale = np.linspace(0, 1, max(width - 2 * GAP, 1), dtype=np.float32)
    sheet.paste(Image.fromarray(_colours(np.tile(scale, (12, 1)))), (left + GAP, top + 4))
    return sheet


def _enlarge(attention: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    image = Image.fromarray(attention).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).clip(0, 1)


def _colours(attention: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) of values in [0, 1]."""
    places = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(attention, places, channel) for channel in COLOURS.T]
    found: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return found


def _overlay(picture: Image.Image, attention: NDArray[np.float32]) -> Image.Image:
    """The picture in dim grey, coloured where there is attention."""
    grey = np.asarray(picture.convert("L"), np.float32)[:, :, None]
    opacity = 0.8 * attention[:, :, None]
    mixed = 0.6 * grey * (1 - opacity) + _colours(attention) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
