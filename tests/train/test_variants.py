"""Attack and loss of each variant, for two different encoders, against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.models.export_models import write_folder
from train.attacks import pgd
from train.attention import attention_map, complementary_attention_map
from train.data.loader import generators
from train.losses import divergence, squared_distance
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.tgazsr import build_optimizer
from train.tgazsr_settings import Settings, checked
from train.variants import WEIGHTS, Batch, attack, loss_terms, needs_labels

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}
SETTINGS = Settings(data=(), out=Path(), eps=0.1, step_size=0.04, attack_steps=3)
LABELS = torch.tensor([2, 0, 1, 1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Classifier, torch.Tensor]:
    """Return the trained classifier, the original one, and the negated text embeddings."""
    folder = tmp_path_factory.mktemp("models")
    sources = [
        load(str(write_folder(folder / str(i), "vit", seed=i, **SMALL)), None) for i in range(2)
    ]
    names = ["cat", "dog", "bird"]
    texts, negated = (class_embeddings(sources[0], names, [t]) for t in ("a {}", "not a {}"))
    trained, original = (Classifier(source, texts).eval() for source in sources)
    return trained, original, negated


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def variant_settings(variant: str, **changes: Any) -> Settings:
    weights = {} if variant in ("tecoa", "at", "fare") else {"alpha": 0.3, "beta": 0.7}
    return checked(replace(SETTINGS, variant=variant, **weights | changes), 1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = (x.double().softmax(1).numpy() for x in (p, q))
    return float((p * np.log(p / q)).sum(1).mean())


DISTANCES = {
    "l2": lambda a, b: np.sqrt(((a - b) ** 2).sum((1, 2, 3))).mean(),
    "l1": lambda a, b: np.abs(a - b).mean(),
    "cos": lambda a, b: np.mean(
        [
            1 - (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
            for x, y in zip(a, b, strict=True)
        ]
    ),
}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("variant", WEIGHTS)
def test_terms(models: Any, images: torch.Tensor, variant: str, distance: str) -> None:
    trained, original, negated = models
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    attacked = (images + 0.1 * noise).clamp(0, 1)
    settings = variant_settings(variant, distance=distance)
    with torch.no_grad():
        batch = Batch(original, images, LABELS, torch.arange(4))
        terms = loss_terms(settings, trained, batch, negated, attacked)
        adv, clean = trained(attacked), trained(images)
        source, reference = original(images), original(attacked)
    probabilities = adv.logits.double().softmax(1).numpy()
    ce = -np.log(probabilities[np.arange(4), LABELS.numpy()]).mean()
    if variant == "fare":
        expected = {"fare": ((adv.embedding - source.embedding) ** 2).sum(1).mean().item()}
    elif variant in ("tecoa", "at"):
        expected = {"ce": ce}
    elif variant == "pmg":
        general, calm = kl(reference.logits, adv.logits), kl(clean.logits, adv.logits)
        expected = {"ce": ce, "general": 0.3 * general, "clean": 0.7 * calm}
    elif variant == "distil":
        target = source.logits
        hard, easy = kl(target, adv.logits), kl(target, clean.logits)
        expected = {"distil": hard, "clean": 0.3 * easy, "ce": 0.7 * ce}
    else:
        text = trained.classes[LABELS]

        def attention(tokens: torch.Tensor) -> np.ndarray:
            if variant == "comp":
                return complementary_attention_map(tokens, text, negated[LABELS], 16).numpy()
            return attention_map(tokens, text, 16).numpy()

        maps = [attention(output.tokens) for output in (adv, source, clean)]
        measure = DISTANCES[distance]
        expected = {
            "ce": ce,
            "ar": 0.3 * measure(maps[0], maps[1]),
            "amc": 0.7 * measure(maps[2], maps[1]),
        }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("variant", WEIGHTS)
def test_attack(models: Any, images: torch.Tensor, variant: str, norm: str) -> None:
    trained, original, _ = models
    seeds = torch.arange(4)
    settings = variant_settings(variant, norm=norm)
    attacked = attack(settings, trained, Batch(original, images, LABELS, seeds), steps=3)

    def plain(model: Classifier) -> torch.Tensor:
        shared: dict[str, Any] = {
            "eps": 0.1, "step_size": 0.04, "steps": 3, "norm": norm,
            "generator": generators(seeds, images.device),
        }  # fmt: skip
        with torch.no_grad():
            target = original(images)
        if variant == "fare":
            shared |= {"loss": squared_distance}
            return pgd(lambda x: model(x).embedding, images, target.embedding, **shared)
        if variant == "distil":
            shared |= {"loss": divergence}
            return pgd(lambda x: model(x).logits, images, target.logits, **shared)
        return pgd(lambda x: model(x).logits, images, LABELS, **shared)

    assert torch.equal(attacked, plain(trained))
    assert not torch.allclose(attacked, plain(original), atol=1e-3)


def count_images(models: Any, images: torch.Tensor, **weights: float) -> tuple[dict, list[int]]:
    """Return the terms of distil on images without labels, and how many images each encoder sees."""
    seen = [0, 0]

    def counting(i: int) -> Any:
        def count(model: Any, arguments: tuple[torch.Tensor]) -> None:
            seen[i] += len(arguments[0])

        return models[i].register_forward_pre_hook(count)

    labels = torch.full((4,), -1) if not weights.get("beta") else LABELS
    batch = Batch(models[1], images, labels, torch.arange(4))
    settings = checked(replace(SETTINGS, variant="distil", **weights), 1)
    assert needs_labels(settings) == bool(weights.get("beta"))
    handles = [counting(i) for i in range(2)]
    attacked = attack(settings, models[0], batch, steps=2)
    terms = loss_terms(settings, models[0], batch, models[2], attacked)
    for handle in handles:
        handle.remove()
    return {name: term.item() for name, term in terms.items()}, seen


def test_terms_of_weight_zero_cost_nothing(models: Any, images: torch.Tensor) -> None:
    """Distil without labels; each image passes the original encoder once, for attack and loss."""
    alone, seen = count_images(models, images)
    assert alone.keys() == {"distil"}
    assert seen == [4 * 3, 4]
    clean, seen = count_images(models, images, alpha=0.5)
    assert clean.keys() == {"distil", "clean"}
    assert seen == [4 * 4, 4]
    labelled, seen = count_images(models, images, beta=0.5)
    assert labelled.keys() == {"distil", "ce"}
    assert seen == [4 * 3, 4]
    assert clean["distil"] == pytest.approx(alone["distil"], rel=1e-5)


def test_attack_of_distil_raises_its_loss(models: Any, images: torch.Tensor) -> None:
    trained, original, negated = models
    settings = variant_settings("distil", alpha=0.0, beta=0.0)
    batch = Batch(original, images, LABELS, torch.arange(4))

    def loss(steps: int) -> float:
        attacked = attack(settings, trained, batch, steps)
        return loss_terms(settings, trained, batch, negated, attacked)["distil"].item()

    assert loss(0) < loss(1) < loss(5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_steps_of_the_optimizer(optimizer: str) -> None:
    """Compare with plain arithmetic: matrices decay, vectors do not."""
    settings = replace(
        SETTINGS, optimizer=optimizer, learning_rate=0.1, momentum=0.6, weight_decay=0.5
    )
    start, gradient = np.array([[2.0, -3.0]]), np.array([[0.5, 4.0]])
    matrix, vector = (torch.nn.Parameter(torch.tensor(x)) for x in (start, start[0]))
    built = build_optimizer([matrix, vector], settings)
    for _ in range(2):
        matrix.grad, vector.grad = torch.tensor(gradient), torch.tensor(gradient[0])
        built.step()

    def expected(decay: float) -> np.ndarray:
        value, first, second = start.copy(), np.zeros((1, 2)), np.zeros((1, 2))
        for step in (1, 2):
            if optimizer == "sgd":
                first = 0.6 * first + gradient + decay * value
                value = value - 0.1 * first
            else:
                first, second = 0.6 * first + 0.4 * gradient, 0.98 * second + 0.02 * gradient**2
                corrected = first / (1 - 0.6**step), second / (1 - 0.98**step)
                value = value * (1 - 0.1 * decay)
                value = value - 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        return value

    np.testing.assert_allclose(matrix.detach().numpy(), expected(0.5), rtol=1e-6)
    np.testing.assert_allclose(vector.detach().numpy(), expected(0.0)[0], rtol=1e-6)


def test_cross_entropy_is_that_of_the_trained_encoder(models: Any, images: torch.Tensor) -> None:
    trained, original, negated = models
    batch = Batch(original, images, LABELS, torch.arange(4))
    terms = loss_terms(variant_settings("tecoa"), trained, batch, negated, images)
    with torch.no_grad():
        other = F.cross_entropy(original(images).logits, LABELS)
    assert abs(terms["ce"].item() - other.item()) > 1e-3
