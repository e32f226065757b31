"""Whole runs of adversarial fine-tuning, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeclip.storage import sha256
from tests.support.models.export_models import write_folder
from tests.support.robustness.tgazsr_runs import (
    CPU,
    SMALL,
    assert_same,
    distil_settings,
    run,
    short_settings,
)
from train import tgazsr
from train.attacks import pgd
from train.data import dataset
from train.data.loader import Pictures, draw, generators
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.models.weight_files import join_sha256
from train.run.loop import epoch_keys
from train.tgazsr_settings import Settings, checked
from train.variants import WEIGHTS, Batch, attack, loss_terms


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "vit", **SMALL)


@pytest.fixture
def settings(model: Path, fashion_folder: Path, tmp_path: Path) -> Settings:
    return short_settings(model, fashion_folder, tmp_path / "run")


@pytest.mark.parametrize("variant", WEIGHTS)
def test_every_variant_lowers_its_loss(settings: Settings, variant: str, model: Path) -> None:
    metrics = run(replace(settings, variant=variant, epochs=5, learning_rate=3e-3))
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 31))
    first, last = (sum(row["loss"] for row in part) for part in (steps[:3], steps[-3:]))
    assert last < 0.9 * first
    terms = {"fare": ["fare"], "tecoa": ["ce"], "at": ["ce"], "pmg": ["ce", "general", "clean"]}
    terms["distil"] = ["distil"]
    for name in terms.get(variant, ["ce", "ar", "amc"]):
        assert steps[-1][name] > 0
    checks = [row for row in metrics if "robust_accuracy" in row]
    assert [row["epoch"] for row in checks] == [1, 2, 3, 4, 5]
    assert all(0 <= row["robust_accuracy"] <= row["clean_accuracy"] + 0.1 for row in checks)

    before, after = load(str(model), None), load(str(settings.out), None)
    for key, value in before.model.state_dict().items():
        moved = not torch.equal(after.model.state_dict()[key], value)
        assert moved == key.startswith("visual."), f"{key}: the image encoder alone is trained"
    assert after.wording["templates"] == before.wording["templates"]
    assert f"fine-tuned by {variant} against linf eps 8/255" in after.wording["description"]
    assert after.config["model_cfg"] == before.config["model_cfg"]
    assert after.config["preprocess_cfg"] == before.config["preprocess_cfg"]


def test_tecoa_is_tga_without_its_terms(settings: Settings) -> None:
    """Train with SGD: its steps are proportional to the gradient, which keeps rounding errors small."""
    tecoa = replace(settings, variant="tecoa", optimizer="sgd", learning_rate=0.02)
    without = replace(tecoa, variant="tga", alpha=0.0, beta=0.0, out=settings.out.parent / "tga")
    run(tecoa)
    run(without)
    assert_same(without.out, tecoa.out, rtol=1e-4, atol=1e-5)


def test_attack_on_the_loss_is_stronger_than_noise(settings: Settings) -> None:
    source = load(settings.model, None)
    pairs = dataset.load(settings.data[0], train=True)
    classifier = Classifier(source, class_embeddings(source, pairs.classes, ["a {}"])).eval()
    images = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels, seeds = torch.arange(30) % 10, torch.arange(30)
    run_settings = checked(settings, 1)
    batch = Batch(classifier, images, labels, seeds)

    def loss(steps: int) -> float:
        attacked = attack(run_settings, classifier, batch, steps)
        assert (attacked - images).abs().max() <= settings.eps + 1e-6
        return torch.nn.functional.cross_entropy(classifier(attacked).logits, labels).item()

    assert loss(0) < loss(2) < loss(10)
    assert all(p.grad is None for p in classifier.parameters())


@pytest.mark.parametrize("variant", ["tga", "comp"])
def test_terms_before_training(settings: Settings, variant: str) -> None:
    """Take one encoder as both: L_AMC is zero, L_AR comes from the attack, gradients are finite."""
    source = load(settings.model, None)
    texts = class_embeddings(source, ["cat", "dog", "bird"], ["a {}"])
    classifier = Classifier(source, texts).eval()
    source.model.visual.requires_grad_(True)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    run_settings = checked(replace(settings, variant=variant), 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    attacked = (images + 0.1 * noise).clamp(0, 1)
    batch = Batch(classifier, images, labels, torch.arange(4))
    terms = loss_terms(run_settings, classifier, batch, texts, attacked)
    assert terms["amc"].item() == pytest.approx(0, abs=1e-4)
    assert terms["ar"].item() > 1e-3
    sum(terms.values()).backward()
    grads = [p.grad for p in classifier.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)


# pmg is left out: its reference depends on the attacked images, but counts as a constant.
@pytest.mark.parametrize("variant", ["tga", "comp", "tecoa", "at", "fare", "distil"])
def test_image_gradients_equal_finite_differences(
    settings: Settings, variant: str, tmp_path: Path
) -> None:
    """Check in float64, through a tiny encoder that differs from the original one."""
    narrow = SMALL | {"image_size": 8, "layers": 1, "width": 16}
    folders = [write_folder(tmp_path / str(i), "vit", seed=i, **narrow) for i in range(2)]
    sources = [load(str(folder), None) for folder in folders]
    texts = class_embeddings(sources[0], ["cat", "dog", "bird"], ["a {}"]).double()
    negated = class_embeddings(sources[0], ["cat", "dog", "bird"], ["no {}"]).double()
    models = []
    for source in sources:
        source.model.visual.double()
        models.append(Classifier(source, texts.float()).double().eval())
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=rng).double()
    noise = 0.05 * torch.randn(images.shape, generator=rng).double()
    run_settings = checked(replace(settings, variant=variant), 1)

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        batch = Batch(models[1], images, torch.tensor([0, 2]), torch.arange(2))
        return sum(loss_terms(run_settings, models[0], batch, negated, attacked).values())

    attacked = (images + noise).requires_grad_()
    assert torch.autograd.gradcheck(loss, attacked, eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"norm": "l2", "eps": 1.0}])
def test_bf16_and_l2(settings: Settings, changes: dict[str, Any]) -> None:
    metrics = run(replace(settings, step_size=0.02, limit_batches=2, epochs=3, **changes))
    steps = [row for row in metrics if "loss" in row]
    assert len(steps) == 6
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in steps)


@pytest.mark.parametrize("variant", ["tecoa", "fare"])
def test_baselines_train_a_tower_without_patch_tokens(
    settings: Settings, tmp_path: Path, variant: str
) -> None:
    resnet = write_folder(tmp_path / "resnet", "resnet")
    metrics = run(replace(settings, model=str(resnet), variant=variant, limit_batches=2))
    assert len([row for row in metrics if "loss" in row]) == 4


@pytest.mark.parametrize("variant", ["tga", "comp"])
def test_siglip_has_patch_tokens(settings: Settings, tmp_path: Path, variant: str) -> None:
    siglip = write_folder(tmp_path / "siglip", "siglip")  # its texts are eight tokens
    short = replace(settings, template="a {}", non_class_template="no {}")
    metrics = run(replace(short, model=str(siglip), variant=variant, limit_batches=2))
    assert all(row["ar"] > 0 for row in metrics if "loss" in row)
    again = load(str(settings.out), None)
    assert (
        again.tokenizer(["a cat"]).tolist() == load(str(siglip), None).tokenizer(["a cat"]).tolist()
    )


@pytest.mark.parametrize("variant", ["tga", "comp"])
def test_a_feature_map_has_patch_tokens(settings: Settings, tmp_path: Path, variant: str) -> None:
    """Train a convolutional tower: its statistics of batch norm stay, its weights do not."""
    model = write_folder(tmp_path / "convolutions", "efficientnet", image_size=65)
    short = replace(settings, model=str(model), variant=variant, batch_size=8, validate=4)
    metrics = run(replace(short, epochs=1, limit_batches=2, warmup_steps=1))
    steps = [row for row in metrics if "loss" in row]
    assert len(steps) == 2
    assert all(row["ar"] > 0 and np.isfinite(row["loss"] + row["gradient_norm"]) for row in steps)
    before, after = (load(str(path), None).model for path in (model, settings.out))
    parameters = dict(before.named_parameters())
    for key, value in before.state_dict().items():
        trained = key.startswith("visual.") and key in parameters
        assert torch.equal(after.state_dict()[key], value) != trained, key
    assert "visual.trunk.bn1.running_var" in before.state_dict()


def test_every_epoch_takes_each_image_once_in_another_order(settings: Settings) -> None:
    run_settings = replace(settings, batch_size=4)
    epochs = [epoch_keys(14, epoch, run_settings, 0, 1) for epoch in range(2)]
    orders = [[index for batch in keys for index, _ in batch] for keys in epochs]
    assert all(len(set(order)) == len(order) == 12 for order in orders)
    assert orders[0] != orders[1]
    seeds = [seed for keys in epochs for batch in keys for _, seed in batch]
    assert len(set(seeds)) == 24
    halves = [epoch_keys(14, 0, run_settings, rank, 2) for rank in range(2)]
    joined = [a + b for a, b in zip(*halves, strict=True)]
    assert joined == epochs[0]


def test_validation_is_an_attack(settings: Settings) -> None:
    """Count again image by image, with PGD on the logits."""
    source = load(settings.model, None)
    test_set = dataset.load(settings.data[0], train=False)
    classifier = Classifier(source, class_embeddings(source, test_set.classes, ["a {}"])).eval()
    pictures = Pictures(test_set, source.model.visual)
    run_settings = checked(replace(settings, eps=0.03, step_size=0.01, validate_steps=5), 1)
    accuracies = tgazsr.validate(run_settings, classifier, pictures, 0, 1)
    right = [0, 0]
    for key in draw(len(test_set), 20, settings.seed):
        image, label, seed = pictures[key]
        images, labels = image[None], torch.tensor([label])
        attacked = pgd(
            lambda x: classifier(x).logits, images, labels, eps=0.03, step_size=0.01, steps=5,
            generator=generators(torch.tensor([seed]), CPU),
        )  # fmt: skip
        for i, batch in enumerate((images, attacked)):
            right[i] += int(classifier(batch).logits.argmax() == label)
    assert accuracies == {"clean_accuracy": right[0] / 20, "robust_accuracy": right[1] / 20}


def test_template_is_recorded_where_the_model_has_none(settings: Settings, model: Path) -> None:
    file = model / "open_clip_config.json"
    config = json.loads(file.read_text())
    del config["edgeclip"]
    file.write_text(json.dumps(config))
    run(replace(settings, limit_batches=2, validate=0, template="one {} here"))
    assert load(str(settings.out), None).wording["templates"] == ["one {} here"]


def test_robust_image_tower_is_trained_further(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    base = load(str(model), None).model.state_dict()
    tower = {k.removeprefix("visual."): v / 2 for k, v in base.items() if "visual." in k}
    torch.save({"vision_encoder_state_dict": tower}, tmp_path / "tecoa.pt")
    changes = {"visual": str(tmp_path / "tecoa.pt"), "quickgelu": True, "learning_rate": 0.0}
    run(replace(settings, epochs=1, limit_batches=3, validate=0, **changes))
    tuned = load(str(settings.out), None)
    assert tuned.quick_gelu
    for key, value in tuned.model.state_dict().items():
        assert torch.equal(value, base[key] / 2 if key.startswith("visual.") else base[key])
    training = json.loads((settings.out / "open_clip_config.json").read_text())["training"]
    files = (model / "open_clip_model.safetensors", tmp_path / "tecoa.pt")
    assert training["weights_sha256"] == join_sha256([sha256(path) for path in files])


def test_distillation_on_two_sets(
    fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train a convolutional tower at growing sizes; the model keeps its statistics and its size."""
    settings = distil_settings(fashion_folder, tmp_path)
    shapes: list[torch.Size] = []

    def terms(*arguments: Any) -> dict[str, torch.Tensor]:
        shapes.append(arguments[-1].shape)
        return loss_terms(*arguments)

    monkeypatch.setattr(tgazsr, "loss_terms", terms)
    metrics = run(settings)
    assert shapes == [(24, 3, 24, 24)] * 4 + [(24, 3, 40, 40)] * 4
    steps = [row for row in metrics if "loss" in row]
    assert all(row["distil"] == row["loss"] > 0 for row in steps)
    before, after = load(settings.model, None), load(str(settings.out), None)
    changed = set()
    for key, value in before.model.state_dict().items():
        if not torch.equal(after.model.state_dict()[key], value):
            changed.add(key)
    weights = {key for key, _ in before.model.visual.named_parameters(prefix="visual")}
    assert changed == weights, "the batch statistics and the text tower are frozen"
    assert any("running_var" in key for key in before.model.state_dict())
    assert after.config["preprocess_cfg"] == before.config["preprocess_cfg"]
    training = json.loads((settings.out / "open_clip_config.json").read_text())["training"]
    assert training["data"] == list(settings.data)
    assert training["images"] == [8, 150]
    assert training["classes"] == ["cat", "dog", "hot air balloon"]
    assert training["image_size"] == [24, 40]


def test_validation_is_on_the_classes_of_the_first_set(
    fashion_folder: Path, tmp_path: Path
) -> None:
    settings = distil_settings(fashion_folder, tmp_path)
    settings = replace(
        settings, data=settings.data[::-1], image_size=(24,), limit_batches=2, epochs=1,
        learning_rate=0.0, warmup_steps=0, validate=1000,
    )  # fmt: skip
    source = load(settings.model, None)
    test_set = dataset.load(settings.data[0], train=False)
    assert len(test_set.classes) == 10
    texts = class_embeddings(source, test_set.classes, [settings.template])
    classifier = Classifier(source, texts)
    pictures = Pictures(test_set, source.model.visual, size=24)
    keys = [(index, 0) for index in range(len(test_set))]
    images, labels, _ = zip(*map(pictures.__getitem__, keys), strict=True)
    with torch.no_grad():
        right = classifier(torch.stack(images)).logits.argmax(1) == torch.tensor(labels)
    metrics = run(settings)
    assert 0 < right.float().mean() < 1
    assert metrics[-1]["clean_accuracy"] == right.sum().item() / len(test_set)


def test_convolutional_tower_is_stored_in_channels_last(
    settings: Settings, fashion_folder: Path, tmp_path: Path
) -> None:
    distilled = distil_settings(fashion_folder, tmp_path)
    source = load(distilled.model, None)
    model, original, _ = tgazsr.build_models(distilled, source, ["cat", "dog"])
    for classifier in (model, original):
        assert not classifier.training
        weights = [p for p in classifier.encoder.parameters() if p.ndim == 4 and p.shape[1] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    plain = load(distilled.model, None)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Classifier(plain, model.classes)(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    vit = load(settings.model, None)
    tgazsr.build_models(settings, vit, ["cat", "dog"])
    assert vit.model.visual.conv1.weight.is_contiguous()
