"""PGD, on models with a known worst perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from train.attacks import LOSSES, Fooled, margin, pgd

SHAPE = (5, 3, 4, 4)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3


LABELS = torch.tensor([0, 1, 2, 0, 1])


def binary(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep two classes: the worst perturbation of a linear model is then known exactly."""
    return lambda x: model(x)[:, :2]


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_model_is_attacked_optimally(
    model: torch.nn.Module, images: torch.Tensor, norm: str, loss: str
) -> None:
    labels, eps = LABELS % 2, 0.1
    attacked = pgd(
        binary(model), images, labels, eps=eps, step_size=10 * eps, steps=8, norm=norm, loss=loss
    )
    towards = (model[1].weight[1 - labels] - model[1].weight[labels]).detach().view(SHAPE)
    if norm == "linf":
        best = images + eps * towards.sign()
    else:
        best = images + eps * towards / towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(attacked, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 3])
def test_attacked_images_stay_in_the_ball_and_in_range(
    model: torch.nn.Module, norm: str, steps: int
) -> None:
    images = torch.rand(
        SHAPE, generator=torch.Generator().manual_seed(2)
    ).round()  # at the ends of the range
    attacked = pgd(
        model, images, LABELS, eps=0.2, step_size=0.15, steps=steps, norm=norm, restarts=3
    )
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    difference = (attacked - images).flatten(1)
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


def test_attack_follows_from_its_seed(model: torch.nn.Module, images: torch.Tensor) -> None:
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
        attacked = pgd(
            bumpy, images, LABELS, eps=0.3, step_size=0.05, steps=2, restarts=restarts,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return margin(bumpy(attacked), LABELS).detach()

    one, ten = strength(1), strength(10)
    assert (ten >= one).all()
    assert (ten > one).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_generator_for_each_image_makes_images_independent(
    model: torch.nn.Module, images: torch.Tensor, norm: str
) -> None:
    def attack(indices: list[int]) -> torch.Tensor:
        return pgd(
            model, images[indices], LABELS[indices], eps=0.1, step_size=0.01, steps=2, norm=norm,
            generator=[torch.Generator().manual_seed(i) for i in indices],
        )  # fmt: skip

    together = attack([0, 1, 2, 3, 4])
    torch.testing.assert_close(attack([3, 1]), together[[3, 1]], rtol=0, atol=1e-6)


def test_loss_function_moves_images_towards_another_image(
    model: torch.nn.Module, images: torch.Tensor
) -> None:
    """Match features: the labels are the outputs to match, and no class is involved."""
    target = model(images.flip(0)).detach()

    def nearness(attacked: torch.Tensor, target_embedding: torch.Tensor) -> torch.Tensor:
        return -(attacked - target_embedding).square().sum(1)

    def reached(restarts: int) -> torch.Tensor:
        attacked = pgd(
            model, images, target, eps=0.1, step_size=0.02, steps=20, loss=nearness,
            restarts=restarts, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return nearness(model(attacked), target).detach()

    assert (reached(1) > nearness(model(images), target))[[0, 1, 3, 4]].all()
    assert (reached(3) >= reached(1) - 1e-5).all()


def test_wrong_number_of_generators_is_refused(
    model: torch.nn.Module, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="got 2 generators for 5 images"):
        pgd(
            model, images, LABELS, eps=0.1, step_size=0.1, steps=1,
            generator=[torch.Generator()] * 2,
        )  # fmt: skip


def seeds(indices: list[int]) -> list[torch.Generator]:
    """Return a generator for each image, so that its noise does not depend on the others."""
    return [torch.Generator().manual_seed(i) for i in indices]


def above(limit: float) -> Fooled:
    """Return whether the margin is above a limit, for `fooled`."""
    return lambda logits, labels: margin(logits, labels) > limit


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("limit", [-1.0, -0.2, 0.0, 0.1, 100.0])
def test_attack_stops_where_an_image_is_fooled(
    model: torch.nn.Module, images: torch.Tensor, norm: str, limit: float
) -> None:
    """Compare with the steps of an attack that does not stop: the first fooled one, or the last."""
    images, labels = images.repeat(7, 1, 1, 1)[:33], LABELS.repeat(7)[:33]
    settings = {"eps": 0.2, "step_size": 0.02, "norm": norm}
    if norm == "l2":
        settings = {"eps": 1.5, "step_size": 0.1, "norm": norm}

    def attack(steps: int, **more: object) -> torch.Tensor:
        return pgd(
            model, images, labels, steps=steps, generator=seeds(list(range(33))), **settings, **more
        )

    steps = 8
    path = [attack(k) for k in range(steps + 1)]
    attacked = attack(steps, fooled=above(limit))
    stops = []
    for i in range(33):
        wrong = [
            k for k in range(steps) if margin(model(path[k][i, None]), labels[i, None]) > limit
        ]
        stops.append(min(wrong, default=steps))
        torch.testing.assert_close(attacked[i], path[stops[i]][i], rtol=0, atol=1e-6)
    if abs(limit) >= 1:
        assert set(stops) == {0 if limit < 0 else steps}
    if limit == 0:
        assert len(set(stops)) > 2


def test_model_does_not_see_fooled_images_again(images: torch.Tensor) -> None:
    batch_sizes = []

    def count(x: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(x))
        return x.flatten(1)[:, :3]

    calls = iter([[False, True, False, False, True], [True, False, False], [False, False]])

    def fooled(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert len(outputs) == len(labels)
        return torch.tensor(next(calls))

    pgd(count, images, LABELS, eps=0.1, step_size=0.1, steps=3, fooled=fooled)
    assert batch_sizes == [5, 3, 2]


def test_attack_ends_when_all_images_are_fooled(images: torch.Tensor) -> None:
    batch_sizes = []

    def count(x: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(x))
        return x.flatten(1)[:, :3]

    attacked = pgd(
        count, images, LABELS, eps=0.1, step_size=0.1, steps=9, random_start=False,
        fooled=lambda outputs, labels: torch.ones(len(outputs), dtype=torch.bool),
    )  # fmt: skip
    assert batch_sizes == [5]
    assert torch.equal(attacked, images)


def test_fooled_gets_the_labels_of_the_remaining_images(images: torch.Tensor) -> None:
    """Use labels of any shape with a row for each image."""
    rows = torch.stack([torch.arange(5), LABELS], dim=1)
    calls = []

    def fooled(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(labels.tolist())
        return labels[:, 0] == len(calls)  # the second image at once, then the third

    pgd(
        lambda x: x.flatten(1)[:, :3], images, rows, eps=0.1, step_size=0.1, steps=3, fooled=fooled,
        loss=lambda outputs, labels: margin(outputs, labels[:, 1]),
    )  # fmt: skip
    rows = rows.tolist()
    assert calls == [rows, [rows[0], *rows[2:]], [rows[0], *rows[3:]]]


@pytest.mark.parametrize("loss", ["ce", "cw", margin], ids=["ce", "cw", "own"])
def test_first_restart_that_fools_is_kept(
    model: torch.nn.Module, images: torch.Tensor, loss: object
) -> None:
    images, labels = images.repeat(7, 1, 1, 1)[:33], LABELS.repeat(7)[:33]
    settings = {"eps": 0.2, "step_size": 0.01, "steps": 2, "fooled": above(0), "loss": loss}
    generator = seeds(list(range(33)))
    tries = [pgd(model, images, labels, generator=generator, **settings) for _ in range(4)]
    margins = torch.stack([margin(model(x), labels) for x in tries])
    attacked = pgd(model, images, labels, generator=seeds(list(range(33))), restarts=4, **settings)
    firsts = set()
    for i in range(33):
        wrong = (margins[:, i] > 0).nonzero().flatten().tolist()
        best = wrong[0] if wrong else margins[:, i].argmax().item()
        firsts.add(best if wrong else -1)
        torch.testing.assert_close(attacked[i], tries[best][i], rtol=0, atol=1e-6)
    assert len(firsts) > 2


@pytest.mark.parametrize("fooled", [None, above(0)], ids=["", "fooled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_restarts_in_other_precisions(
    model: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype, fooled: object
) -> None:
    for loss in ("cw", lambda outputs, labels: outputs[:, 0]):
        attacked = pgd(
            model.to(dtype), images.to(dtype), LABELS, eps=0.1, step_size=0.1, steps=2, restarts=3,
            loss=loss, fooled=fooled,
        )  # fmt: skip
        assert attacked.dtype == dtype
        assert (attacked.double() - images.double()).abs().max() < 0.11


def test_each_step_sums_the_gradients_of_its_draws(images: torch.Tensor) -> None:
    batch_sizes = []

    def count(x: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(x))
        return x.flatten(1)[:, :3]

    pgd(count, images, LABELS, eps=0.1, step_size=0.1, steps=3, draws=7)
    assert batch_sizes == [5] * 21


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_draws_find_the_optimum_of_a_random_models_mean(
    model: torch.nn.Module, images: torch.Tensor, norm: str
) -> None:
    """Hide the weights in noise drawn at each call: only an average reveals them."""
    labels, eps = LABELS % 2, 0.1
    towards = (model[1].weight[1 - labels] - model[1].weight[labels]).detach()

    def noisy(x: torch.Tensor) -> torch.Tensor:
        weight = model[1].weight[:2] + 0.5 * torch.randn(2, 48)
        return x.flatten(1) @ weight.T

    def share(draws: int) -> float:
        """Return the gain of the attack, as a share of the best perturbation's."""
        torch.manual_seed(0)
        attacked = pgd(
            noisy, images, labels, eps=eps, step_size=10 * eps, steps=1, norm=norm, loss="cw",
            random_start=False, draws=draws,
        )  # fmt: skip
        gained = ((attacked - images).flatten(1) * towards).sum(1)
        best = towards.abs().sum(1) if norm == "linf" else towards.norm(dim=1)
        return (gained / (eps * best)).mean().item()

    assert share(1000) > 0.93
    assert share(1) < 0.6


def test_draws_of_a_deterministic_model_change_nothing(
    model: torch.nn.Module, images: torch.Tensor
) -> None:
    def attack(draws: int) -> torch.Tensor:
        return pgd(
            model, images, LABELS, eps=0.1, step_size=0.02, steps=3, norm="l2", draws=draws,
            generator=seeds([0, 1, 2, 3, 4]), fooled=above(0),
        )  # fmt: skip

    torch.testing.assert_close(attack(5), attack(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_losses_are_not_taken_in_half_precision(loss: str) -> None:
    """Compute the margin in float32: bfloat16 would round small differences of logits to no gradient."""
    logits = torch.tensor([[30.0, 10.0, 0.0]], dtype=torch.bfloat16)
    value = LOSSES[loss](logits, torch.tensor([0]))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[loss](logits.float(), torch.tensor([0])))
    assert LOSSES[loss](logits.double(), torch.tensor([0])).dtype == torch.float64


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
        ({"step_size": math.nan}, "must be 0 or more, got .* and nan"),
        ({"step_size": math.inf}, "must be 0 or more"),
        ({"norm": "l2", "eps": math.nan}, "must be 0 or more"),
        ({"restarts": 0}, "restarts and draws 1 or more"),
        ({"draws": 0}, "restarts and draws 1 or more, got .* 1 and 0"),
        ({"draws": -3}, "restarts and draws 1 or more"),
        ({"norm": "l1"}, "norm must be linf or l2"),
        ({"loss": "mse"}, "loss must be one of ce, cw"),
    ],
)
def test_bad_settings(
    model: torch.nn.Module, images: torch.Tensor, change: dict[str, Any], message: str
) -> None:
    settings = {"eps": 0.1, "step_size": 0.1, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        pgd(model, images, LABELS, **settings)


def test_float16_is_refused(model: torch.nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float16"):
        pgd(model, images.half(), LABELS, eps=0.1, step_size=0.1, steps=1)
