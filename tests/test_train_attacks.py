"""PGD on models whose worst perturbation is known."""

from __future__ import annotations

import pytest
import torch

from train.attacks import margin, pgd

SHAPE = (5, 3, 4, 4)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3


LABELS = torch.tensor([0, 1, 2, 0, 1])


def binary(model: torch.nn.Module):  # type: ignore[no-untyped-def]
    """Of two classes, so that the worst perturbation of a linear model is known exactly."""
    return lambda x: model(x)[:, :2]


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_model_is_attacked_optimally(
    model: torch.nn.Module, images: torch.Tensor, norm: str, loss: str
) -> None:
    labels, eps = LABELS % 2, 0.1
    found = pgd(
        binary(model), images, labels, eps=eps, step_size=10 * eps, steps=8, norm=norm, loss=loss
    )
    towards = (model[1].weight[1 - labels] - model[1].weight[labels]).detach().view(SHAPE)
    if norm == "linf":
        best = images + eps * towards.sign()
    else:
        best = images + eps * towards / towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 3])
def test_stays_in_the_ball_and_in_the_range(model: torch.nn.Module, norm: str, steps: int) -> None:
    images = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)).round()  # at the edges
    found = pgd(model, images, LABELS, eps=0.2, step_size=0.15, steps=steps, norm=norm, restarts=3)
    assert found.min() >= 0
    assert found.max() <= 1
    difference = (found - images).flatten(1)
    size = difference.abs().amax(1) if norm == "linf" else difference.norm(dim=1)
    assert size.max() <= 0.2 + 1e-6
    assert size.min() > 0


def test_weights_gradients_are_untouched(model: torch.nn.Module, images: torch.Tensor) -> None:
    model(images).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    pgd(model, images, LABELS, eps=0.1, step_size=0.1, steps=2)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    assert not images.requires_grad


def test_seeded(model: torch.nn.Module, images: torch.Tensor) -> None:
    def attack(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pgd(model, images, LABELS, eps=0.1, step_size=0.01, steps=2, generator=generator)

    torch.testing.assert_close(attack(0), attack(0), rtol=0, atol=0)
    assert not torch.equal(attack(0), attack(1))


def test_more_restarts_are_never_weaker(images: torch.Tensor) -> None:
    torch.manual_seed(3)
    bumpy = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
    )

    def strength(restarts: int) -> torch.Tensor:
        found = pgd(
            bumpy, images, LABELS, eps=0.3, step_size=0.05, steps=2, restarts=restarts,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return margin(bumpy(found), LABELS).detach()

    one, ten = strength(1), strength(10)
    assert (ten >= one).all()
    assert (ten > one).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_generators_of_images_make_them_independent(
    model: torch.nn.Module, images: torch.Tensor, norm: str
) -> None:
    def attack(chosen: list[int]) -> torch.Tensor:
        return pgd(
            model, images[chosen], LABELS[chosen], eps=0.1, step_size=0.01, steps=2, norm=norm,
            generator=[torch.Generator().manual_seed(i) for i in chosen],
        )  # fmt: skip

    together = attack([0, 1, 2, 3, 4])
    torch.testing.assert_close(attack([3, 1]), together[[3, 1]], rtol=0, atol=1e-6)


def test_own_loss_moves_towards_another_image(model: torch.nn.Module, images: torch.Tensor) -> None:
    """A feature-matching attack: labels are the outputs to match, and no class is involved."""
    target = model(images.flip(0)).detach()

    def nearness(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return -(found - wanted).square().sum(1)

    def reached(restarts: int) -> torch.Tensor:
        found = pgd(
            model, images, target, eps=0.1, step_size=0.02, steps=20, loss=nearness,
            restarts=restarts, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return nearness(model(found), target).detach()

    assert (reached(1) > nearness(model(images), target))[[0, 1, 3, 4]].all()
    assert (reached(3) >= reached(1) - 1e-5).all()


def test_as_many_generators_as_images(model: torch.nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="got 2 generators for 5 images"):
        pgd(
            model, images, LABELS, eps=0.1, step_size=0.1, steps=1,
            generator=[torch.Generator()] * 2,
        )  # fmt: skip


def test_margin_equals_a_plain_loop() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = [
        max(row[j] for j in range(4) if j != y) - row[y]
        for row, y in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    torch.testing.assert_close(margin(logits, LABELS), torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8}, r"eps is in units of \[0, 1\], got 8: for 8 of 255 give 8/255"),
        ({"eps": -0.1}, "eps is in units"),
        ({"step_size": -1}, "must be 0 or more"),
        ({"restarts": 0}, "restarts 1 or more"),
        ({"norm": "l1"}, "norm must be linf or l2"),
        ({"loss": "mse"}, "loss must be one of ce, cw"),
    ],
)
def test_bad_settings(
    model: torch.nn.Module, images: torch.Tensor, change: dict, message: str
) -> None:
    settings = {"eps": 0.1, "step_size": 0.1, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        pgd(model, images, LABELS, **settings)


def test_float16_is_refused(model: torch.nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float16"):
        pgd(model, images.half(), LABELS, eps=0.1, step_size=0.1, steps=1)
