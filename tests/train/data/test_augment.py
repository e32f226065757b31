"""Augmentation of photographs: parts of the decoded picture, and coarse pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from train.data.augment import AUGMENTATIONS, draw_window, photographs
from train.data.dataset import DataSet
from train.data.loader import Pictures
from train.data.samples import ImageFiles


def windows(height: int, width: int, count: int = 500) -> list[tuple[slice, slice]]:
    return [
        draw_window(height, width, torch.Generator().manual_seed(seed)) for seed in range(count)
    ]


def test_windows_have_the_area_and_aspect() -> None:
    sizes = np.array([[r.stop - r.start, c.stop - c.start] for r, c in windows(600, 600)])
    area, aspect = sizes.prod(1) / 600**2, sizes[:, 1] / sizes[:, 0]
    assert 0.34 < area.min() < 0.37
    assert 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.34
    assert abs(np.log(aspect).mean()) < 0.03


def test_windows_lie_inside_and_reach_each_side() -> None:
    for height, width in ((600, 600), (40, 300), (1, 1), (3, 1)):
        for rows, columns in windows(height, width):
            assert 0 <= rows.start < rows.stop <= height
            assert 0 <= columns.start < columns.stop <= width
    starts = np.array([[rows.start, columns.start] for rows, columns in windows(600, 600)])
    ends = np.array([[rows.stop, columns.stop] for rows, columns in windows(600, 600)])
    assert starts.min() < 5
    assert ends.max() > 595


def test_photographs_are_parts_of_the_decoded_picture(tmp_path: Path) -> None:
    """Compare with Pillow's crop and resize; a quarter is coarse, half of the others mirrored."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (180, 260, 3), np.uint8))
    file = tmp_path / "noise.png"
    image.save(file)
    data = DataSet("noise", ("noise",), ("{}",), ImageFiles.of([str(file)], [0]))
    visual = SimpleNamespace(preprocess_cfg={"size": 224, "interpolation": "bicubic"})
    pictures = Pictures(data, visual, AUGMENTATIONS["photographs"], 128)
    kinds = {"plain": 0, "mirrored": 0, "coarse": 0}
    for seed in range(200):
        pixels, label, again = pictures[0, seed]
        assert (pixels.shape, label, again) == ((3, 128, 128), 0, seed)
        rows, columns = draw_window(180, 260, torch.Generator().manual_seed(seed))
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        resized = np.asarray(part.resize((128, 128), Image.Resampling.BICUBIC)) / 255
        expected = torch.tensor(resized).permute(2, 0, 1)
        if (pixels - expected).abs().max() < 1.01 / 255:
            kinds["plain"] += 1
        elif (pixels.flip(-1) - expected).abs().max() < 1.01 / 255:
            kinds["mirrored"] += 1
        else:
            kinds["coarse"] += 1
            assert pixels.diff().abs().mean() < 0.8 * expected.diff().abs().mean()
    assert 55 < kinds["plain"] < 95
    assert 55 < kinds["mirrored"] < 95
    assert 30 < kinds["coarse"] < 70


def test_coarse_pictures_keep_their_content() -> None:
    """Change a smooth picture little, and a small one not at all."""
    ramp = torch.linspace(0, 1, 160).expand(3, 160, 160).contiguous()
    for seed in range(40):
        output = photographs(ramp, torch.Generator().manual_seed(seed))
        smallest = min((output - x).abs().max() for x in (ramp, ramp.flip(-1)))
        assert smallest < 0.03
    small = torch.rand(3, 32, 20, generator=torch.Generator().manual_seed(0))
    for seed in range(40):
        output = photographs(small, torch.Generator().manual_seed(seed))
        assert torch.equal(output, small) or torch.equal(output, small.flip(-1))
