"""Text-guided attention: maps of the image patches that support a label, and their drawing.

TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3.2. Its training keeps this map stable
under attack; here it is computed from the `tokens` output of the exported encoder.
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

FLAT = 1e-7  # range of scores, at most about 1; smaller ranges are float32 noise
TILE = 320  # minimum length of a tile's longer side, in pixels
GAP = 16
# Stops of matplotlib's inferno, from black to pale yellow, with even steps of lightness.
COLOURS = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attention of one image to one label."""

    label: str
    attention: NDArray[np.float32]  # (H, W) in [0, 1], at the encoder's input size
    image: NDArray[np.uint8]  # (H, W, 3), the encoder's input
    similarity: float  # cosine of the image's and the label's embeddings, before any purification


def attention_map(
    tokens: NDArray[np.float32],
    text: NDArray[np.float32],
    grid: tuple[int, int],
    prefix: int,
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """Return the attention of an image to a text, float32 (H, W) in [0, 1] with (H, W) = size.

    tokens: float (prefix + rows * columns, D), in the embedding's space: `prefix` class tokens, then
    the patches of `grid`, rows and columns. text: unit (D,).
    The patch scores are stretched to [0, 1], then interpolated between patch centres (TGA-ZSR,
    section 3.2). Equal scores of all patches give zeros. Raises ValueError for wrong shapes.
    """
    rows, columns = grid
    if tokens.ndim != 2 or len(tokens) != prefix + rows * columns or text.shape != tokens.shape[1:]:
        raise ValueError(
            f"[attention_map] expected tokens ({prefix} + {rows} * {columns}, D) and text (D,), "
            f"got {tokens.shape} and {text.shape}"
        )
    exact = tokens.astype(np.float64)
    # As published, the norm is taken of each feature over the tokens, not of each token.
    norms = np.linalg.norm(exact, axis=0)
    scores = (exact[prefix:] / np.where(norms > 0, norms, 1)) @ text.astype(np.float64)
    low, high = scores.min(), scores.max()
    if high - low <= FLAT:
        return np.zeros(size, np.float32)
    patches = ((scores - low) / (high - low)).reshape(grid)
    down, across = _bilinear(size[0], rows), _bilinear(size[1], columns)
    attention: NDArray[np.float32] = (down @ patches @ across.T).clip(0, 1).astype(np.float32)
    return attention


def _bilinear(size: int, patches: int) -> NDArray[np.float64]:
    """Return weights (size, patches) of linear interpolation between patch centres.

    They equal PyTorch's F.interpolate with align_corners=False and antialias=False.
    """
    centres = (np.arange(size) + 0.5) * patches / size - 0.5
    distances = np.abs(centres.clip(0, patches - 1)[:, None] - np.arange(patches))
    weights: NDArray[np.float64] = (1 - distances).clip(0)
    return weights


def distance(a: Explanation, b: Explanation) -> float:
    """Return the l2 distance of two maps over all pixels: L_AR of TGA-ZSR, for one image.

    Raises ValueError for maps of different sizes.
    """
    return float(np.linalg.norm(_difference(a, b)))


def _difference(a: Explanation, b: Explanation) -> NDArray[np.float32]:
    if a.attention.shape != b.attention.shape:
        raise ValueError(
            f"[explain] expected maps of one size, got {a.attention.shape} and {b.attention.shape}"
        )
    difference: NDArray[np.float32] = np.abs(a.attention - b.attention)
    return difference


def as_picture(pixels: NDArray[np.float32], spec: ImageSpec) -> NDArray[np.uint8]:
    """Convert the encoder's input, float32 (3, H, W), to a picture, uint8 (H, W, 3)."""
    std, mean = np.asarray(spec.std, np.float32), np.asarray(spec.mean, np.float32)
    levels = (pixels.transpose(1, 2, 0) * std + mean) * 255
    picture: NDArray[np.uint8] = levels.round().clip(0, 255).astype(np.uint8)
    return picture


def render(
    explanations: Sequence[Explanation], captions: Sequence[str] | None = None
) -> Image.Image:
    """Draw each image, its attention laid over it, and the attention alone.

    Each explanation has a row. Two explanations also get the difference of their maps.
    captions: names of the images; by default "clean" and "attacked" for two.
    Raises ValueError for no explanation, another number of captions, or different sizes.
    """
    count = len(explanations)
    if captions is None:
        captions = ("clean", "attacked") if count == 2 else ("image",) * count
    if not count or len(captions) != count:
        raise ValueError(f"[render] got {count} explanations and {len(captions)} captions")
    height, width = explanations[0].attention.shape
    factor = -(-TILE // max(height, width))  # an integer, so that pixels stay square
    size = width * factor, height * factor
    smooth = Image.Resampling.BICUBIC if factor < 4 else Image.Resampling.NEAREST
    tiles = []
    for row, (explanation, caption) in enumerate(zip(explanations, captions, strict=True)):
        if explanation.attention.shape != (height, width):
            raise ValueError("[render] expected explanations of one size")
        picture = Image.fromarray(explanation.image).resize(size, smooth)
        attention = _enlarge(explanation.attention, size)
        tiles += [
            _Tile(row, 0, f"{caption}, similarity {explanation.similarity:.3f}", picture),
            _Tile(row, 1, explanation.label, _overlay(picture, attention)),
            _Tile(row, 2, "attention", Image.fromarray(_colours(attention))),
        ]
    if count == 2:
        difference = _difference(*explanations)
        caption = f"difference, l2 {np.linalg.norm(difference):.2f}"
        heat = Image.fromarray(_colours(_enlarge(difference, size)))
        tiles.append(_Tile(0.5, 3, caption, heat))
    return _sheet(tiles)


def picture_format(path: str) -> str:
    """Return Pillow's name for the image format of a file's suffix.

    PNG for `-`, and for pipes and devices without a suffix. Raises EdgeclipError.
    """
    suffix = os.path.splitext(path)[1].lower()
    if path == "-" or (not suffix and path and os.path.exists(path) and is_stream(path)):
        return "PNG"
    kind = Image.registered_extensions().get(suffix, "")
    try:
        Image.new("RGB", (1, 1)).save(
            io.BytesIO(), kind
        )  # fails for formats without colour or writing
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
    """Place tiles of one size on white, each below its caption, with a colour scale at the bottom."""
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
    """Map values in [0, 1] to colours, uint8 (H, W, 3)."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(attention, stops, channel) for channel in COLOURS.T]
    colours: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colours


def _overlay(picture: Image.Image, attention: NDArray[np.float32]) -> Image.Image:
    """Draw the picture in dim grey, coloured by attention."""
    grey = np.asarray(picture.convert("L"), np.float32)[:, :, None]
    opacity = 0.8 * attention[:, :, None]
    mixed = 0.6 * grey * (1 - opacity) + _colours(attention) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
