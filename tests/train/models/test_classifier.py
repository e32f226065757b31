"""Classifier, image loading and augmentation in training against the runtime and open_clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torchvision import transforms

import edgeclip
from tests.support.models.export_models import exported
from train.data.augment import AUGMENTATIONS
from train.data.dataset import DataSet
from train.data.loader import Pictures, batches, draw, generators, seed_of
from train.data.samples import ImageFiles
from train.errors import DataError
from train.models.classifier import Classifier, class_embeddings

PHOTOS = sorted(Path("examples").glob("*.jpg"))
NAMES = ("trousers", "dress", "boot")


@pytest.fixture
def photos() -> DataSet:
    paths = [str(path) for path in PHOTOS]
    return DataSet("photos", NAMES, ("a {}.",), ImageFiles.of(paths, [0, 1, 2]))


@pytest.mark.parametrize("family", ["vit", "siglip", "efficientnet", "resnet"])
def test_logits_equal_the_runtimes(photos: DataSet, family: str) -> None:
    export = exported(family)
    rt = edgeclip.Runtime(export.bundle, purify="none", decode="exact")
    templates = export.bundle.manifest.templates
    classes = class_embeddings(export.source, NAMES, templates)
    np.testing.assert_allclose(classes, rt.labels(NAMES).embeddings, atol=1e-6)

    model = Classifier(export.source, classes).eval()
    pictures = Pictures(photos, export.source.model.visual)
    (batch,) = batches(pictures, [[(i, 0) for i in range(3)]], workers=0)
    images, labels, _ = batch
    assert labels.tolist() == [0, 1, 2]
    assert 0 <= images.min() < images.max() <= 1
    with torch.no_grad():
        output = model(images)
    scores = output.logits.softmax(1).numpy()
    for row, answer in zip(scores, rt.classify([str(p) for p in PHOTOS], NAMES), strict=True):
        for prediction in answer:
            assert row[prediction.index] == pytest.approx(prediction.score, abs=1e-5)
    with torch.no_grad():
        normalised = transforms.Normalize(*(PREPROCESS[k] for k in ("mean", "std")))(images)
        reference = export.source.model.encode_image(normalised)
    torch.testing.assert_close(output.embedding, reference, rtol=1e-5, atol=1e-5)
    assert (output.tokens is None) == (family == "resnet")


@pytest.mark.parametrize("same", ["Dress", " dress ", "dress"])
def test_classes_of_the_same_tokens_are_refused(same: str) -> None:
    source = exported("vit").source
    with pytest.raises(DataError, match=f"classes 'dress' and '{same}' cannot be told apart"):
        class_embeddings(source, ("boot", "dress", same), ("a {}.", "the {}"))


PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}  # shared by every exported family


@pytest.mark.parametrize("size", [None, 24, 47])
def test_pixels_equal_open_clips(photos: DataSet, size: int | None) -> None:
    """Compare before normalisation; the resize rounds to whole levels, like Pillow's."""
    visual = exported("vit").source.model.visual
    config = open_clip.transform.PreprocessCfg(
        **visual.preprocess_cfg
        | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        | ({"size": size} if size else {})
    )
    reference = open_clip.transform.image_transform_v2(config, is_train=False)
    pictures = Pictures(photos, visual, size=size)
    for i in range(3):
        image, _ = photos[i]
        expected = reference(transforms.ToPILImage()(image))
        assert (pictures[i, 0][0] - expected).abs().max() <= 1 / 255 + 1e-6


def test_workers_do_not_change_batches(photos: DataSet) -> None:
    pictures = Pictures(photos, exported("vit").source.model.visual, AUGMENTATIONS["crop"])
    keys = [[(0, 5), (2, 6)], [(1, 7), (1, 8)]]
    serial, parallel = (list(batches(pictures, keys, workers)) for workers in (0, 1))
    for first, second in zip(serial, parallel, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(serial[1][0][0], serial[1][0][1]), "seeds give the same image"


@pytest.mark.parametrize("name", [name for name, augment in AUGMENTATIONS.items() if augment])
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (28, 28)])
def test_augmentations(name: str, size: tuple[int, int]) -> None:
    augment = AUGMENTATIONS[name]
    assert augment is not None
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))

    def augmented(seed: int) -> torch.Tensor:
        return augment.pixels(image, torch.Generator().manual_seed(seed))

    outputs = [augmented(seed) for seed in range(20)]
    for output in outputs:
        assert output.shape == image.shape
        assert output.dtype == torch.float32
        assert 0 <= output.min() <= output.max() <= 1
    assert torch.equal(augmented(3), outputs[3])
    if size != (1, 1):
        assert len({tuple(output.ravel().tolist()) for output in outputs}) > 1


def test_draw_is_seeded_and_takes_no_image_twice() -> None:
    keys = draw(50, 20, seed=1)
    assert len({index for index, _ in keys}) == len({seed for _, seed in keys}) == 20
    assert draw(50, 20, seed=1) == keys != draw(50, 20, seed=2)
    assert draw(50, 10, seed=1) == keys[:10]
    assert sorted(index for index, _ in draw(5, 100, seed=0)) == [0, 1, 2, 3, 4]


def test_seeds_are_distinct() -> None:
    assert len({seed_of(a, b) for a in range(40) for b in range(40)}) == 1600
    assert seed_of(1, 23) != seed_of(12, 3)
    first, second = generators(torch.tensor([3, 4]), torch.device("cpu"))
    assert not torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))
