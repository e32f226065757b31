"""Diffusion prior against the released code's values, a float64 transformer and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.models.prior_models import relative
from tests.support.models.prior_reference import transformer
from tests.support.paths import VECTORS
from train.diffusion_prior import DiffusionPrior
from train.errors import ModelError
from train.models.prior import Schedule, Shape

GOLDEN = VECTORS / "diffusion_prior.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


@pytest.fixture(scope="module")
def state(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}


@pytest.fixture(scope="module")
def prior(state: dict[str, torch.Tensor]) -> DiffusionPrior:
    return DiffusionPrior.from_state_dict(state)


@pytest.fixture(scope="module")
def texts(golden: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return golden["text_embed"], golden["text_encodings"]


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=rng), dim=1)


# Golden values.


def test_golden_predictions(prior: DiffusionPrior, golden: dict, texts: tuple) -> None:
    for i, timestep in enumerate(golden["times"]):
        times = timestep.expand(2)
        x0 = golden["image_embed_scale"].float() * golden["z"]
        noisy = prior.noise_scheduler(x0, times, golden["noise"][i])
        with torch.no_grad():
            pred = prior.predict(noisy, times, *texts)
            without = prior.predict(noisy, times, *texts, mask_text=True)
        assert pred.dtype == torch.float32
        assert relative(pred, golden["pred"][i]) < 1e-5
        assert relative(without, golden["pred_uncond"][i]) < 1e-5
        assert relative(pred, without) > 1e-3  # the text matters


def test_golden_losses_and_gradients(prior: DiffusionPrior, golden: dict, texts: tuple) -> None:
    x0 = golden["image_embed_scale"].float() * golden["z"]
    assert golden["image_embed_scale"].item() == pytest.approx(prior.shape.dim**0.5)
    for i, timestep in enumerate(golden["times"]):
        loss, gradient = prior.loss_and_grad(x0, timestep.expand(2), golden["noise"][i], *texts)
        assert not gradient.requires_grad
        assert loss.item() == pytest.approx(golden["loss"][i].item(), rel=1e-5)
        assert relative(gradient, golden["grad"][i]) < 1e-5


def test_sizes_are_read_from_the_state(prior: DiffusionPrior) -> None:
    assert prior.shape == Shape(dim=32, depth=2, heads=4, timesteps=1000)
    assert not any(p.requires_grad for p in prior.parameters())
    assert not prior.training


def test_own_schedule_equals_the_released_one(state: dict[str, torch.Tensor]) -> None:
    for name, values in Schedule(1000).state_dict().items():
        torch.testing.assert_close(
            values, state[f"noise_scheduler.{name}"], rtol=2e-6, atol=1e-7
        )  # the last signal is 5e-6 of the first


def test_noise_is_added_by_the_schedule(prior: DiffusionPrior, state: dict) -> None:
    x0, noise = unit(3, 32), unit(3, 32, 1)
    times = torch.tensor([0, 500, 999])
    alphas = state["noise_scheduler.alphas_cumprod"].double()[times][:, None]
    expected = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
    torch.testing.assert_close(prior.noise_scheduler(x0, times, noise).double(), expected,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


# Cached keys and values of the text.


@pytest.mark.parametrize("masked", ["nothing", "padding", "text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefix_memory_equals_the_whole_transformer(
    state: dict, texts: tuple, dtype: torch.dtype, masked: str
) -> None:
    prior = DiffusionPrior.from_state_dict(state).to(dtype)
    weights = {key: value.double().numpy() for key, value in state.items()}
    embed, encodings = (x.to(dtype) for x in texts)
    rng = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 32, generator=rng).to(dtype)
    times = torch.tensor([905, 17])
    mask = torch.ones(2, 77, dtype=torch.bool)
    if masked == "padding":
        mask[0, 9:], mask[1, 70:], mask[1, 3] = False, False, False
    context = prior.context(embed, encodings, masked == "text", mask)
    with torch.no_grad():
        predicted = prior.denoise(noisy, times, context)
    for i in range(2):
        visible = np.append(mask[i].numpy(), True) & (masked != "text")
        expected = transformer(
            weights, noisy[i].double().numpy(), int(times[i]), embed[i].double().numpy(),
            encodings[i].double().numpy(), visible,
        )  # fmt: skip
        # Frequencies are stored in float32.
        assert relative(predicted[i], expected) < (1e-5 if dtype == torch.float32 else 2e-6)


@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("length", [1, 5, 77])
def test_one_text_for_all_equals_a_text_for_each(
    prior: DiffusionPrior, texts: tuple, length: int, count: int
) -> None:
    embed, encodings = texts[0][:1], texts[1][:1, :length]
    noisy, times = unit(count, 32), torch.arange(count) * 30
    with torch.no_grad():
        shared = prior.denoise(noisy, times, prior.context(embed, encodings))
        separate = prior.predict(
            noisy, times, embed.expand(count, -1), encodings.expand(count, -1, -1)
        )
    assert relative(shared, separate) < 1e-6


def test_masked_tokens_do_not_change_the_prediction(prior: DiffusionPrior, texts: tuple) -> None:
    embed, encodings = texts[0][:1], texts[1][:1]
    other = encodings.clone()
    other[:, 40:] = unit(37, 32, 7) * 6  # the first norm would remove a constant
    mask = torch.arange(77)[None] < 40
    noisy, times = unit(3, 32), torch.full((3,), 950)
    with torch.no_grad():
        hidden, same = (
            prior.denoise(noisy, times, prior.context(embed, x, text_mask=mask))
            for x in (encodings, other)
        )
        visible, another = (
            prior.denoise(noisy, times, prior.context(embed, x)) for x in (encodings, other)
        )
    assert torch.equal(hidden, same)
    assert relative(visible, another) > 1e-4
    assert relative(visible, hidden) > 1e-4


def test_mask_text_hides_the_whole_text(prior: DiffusionPrior, texts: tuple) -> None:
    noisy, times = unit(2, 32), torch.full((2,), 950)
    with torch.no_grad():
        masked = prior.predict(noisy, times, *texts, mask_text=True)
        other = prior.predict(noisy, times, texts[0] + 1, texts[1].flip(1), mask_text=True)
    assert torch.equal(masked, other)


def test_scores_do_not_depend_on_the_batch(prior: DiffusionPrior, texts: tuple) -> None:
    context = prior.context(texts[0][:1], texts[1][:1])
    z, noise, times = unit(33, 32), unit(33, 32, 1) * 6, torch.arange(33) + 900
    losses, gradients = prior.score(z, times, noise, context)
    for i in (0, 16, 32):
        row = slice(i, i + 1)
        loss, gradient = prior.score(z[row], times[row], noise[row], context)
        assert relative(loss, losses[row]) < 1e-5
        assert relative(gradient, gradients[row]) < 1e-5


# Gradients.


@pytest.fixture(scope="module")
def wide(state: dict, texts: tuple) -> tuple:
    """Return the float64 prior, a text's context, and three embeddings with timesteps and noise."""
    prior = DiffusionPrior.from_state_dict(state).double()
    context = prior.context(texts[0][:1].double(), texts[1][:1].double())
    times = torch.tensor([3, 640, 950])
    return prior, context, unit(3, 32).double(), times, 6 * unit(3, 32, 1).double()


def test_gradient_equals_finite_differences(wide: tuple) -> None:
    """Differentiate the whole loss, whose target depends on z as well."""
    prior, context, z, times, noise = wide
    _, gradient = prior.score(z, times, noise, context)

    def loss(point: torch.Tensor) -> torch.Tensor:
        x0 = 32**0.5 * point
        predicted = prior.denoise(prior.noise_scheduler(x0, times, noise), times, context)
        return (predicted - x0).square().mean(1)

    step = 1e-5
    with torch.no_grad():
        columns = [
            (loss(z + step * e) - loss(z - step * e)) / (2 * step) for e in torch.eye(32).double()
        ]
    numeric = torch.stack(columns, dim=1)
    for computed, expected in zip(gradient, numeric, strict=True):
        assert relative(computed, expected) < 1e-7


def test_loss_and_grad_averages_over_the_batch(wide: tuple, texts: tuple) -> None:
    prior, context, z, times, noise = wide
    losses, gradient = prior.score(z, times, noise, context)
    embed, encodings = (x[:1].double().expand(3, *x.shape[1:]) for x in texts)
    loss, mean = prior.loss_and_grad(32**0.5 * z, times, noise, embed, encodings)
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-10)
    assert relative(mean, gradient / 32**0.5 / 3) < 1e-10


def test_forward_gradient_treats_the_prediction_as_constant(wide: tuple) -> None:
    prior, context, z, times, noise = wide
    losses, gradient = prior.score(z, times, noise, context, exact=False)
    x0 = 32**0.5 * z
    predicted = prior.denoise(prior.noise_scheduler(x0, times, noise), times, context)
    assert relative(gradient, 2 / 32**0.5 * (x0 - predicted)) < 1e-12
    exact_losses, exact = prior.score(z, times, noise, context)
    assert relative(losses, exact_losses) < 1e-12
    assert relative(gradient, exact) > 1e-2


@pytest.mark.parametrize("exact", [True, False])
def test_scores_can_be_differentiated_again(wide: tuple, exact: bool) -> None:
    prior, context, z, times, noise = wide
    rng = torch.Generator().manual_seed(5)
    incoming = torch.randn(3, 32, generator=rng).double()
    z = z.clone().requires_grad_()
    losses, gradient = prior.score(z, times, noise, context, exact=exact)
    (second,) = torch.autograd.grad(gradient, z, incoming, retain_graph=True)
    (slope,) = torch.autograd.grad(losses.sum(), z)
    exact_slope = prior.score(z.detach(), times, noise, context)[1]
    assert relative(slope, exact_slope) < 1e-10

    def value(point: torch.Tensor) -> torch.Tensor:
        return (prior.score(point, times, noise, context, exact=exact)[1] * incoming).sum(1)

    step = 1e-5
    z = z.detach()
    axes = torch.eye(32).double()[::5]
    columns = [(value(z + step * e) - value(z - step * e)) / (2 * step) for e in axes]
    assert relative(second[:, ::5], torch.stack(columns, dim=1)) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_scores_have_no_graph_if_z_has_none(wide: tuple, exact: bool) -> None:
    prior, context, z, times, noise = wide
    attached = z.clone().requires_grad_()
    with torch.no_grad():
        scores = prior.score(attached, times, noise, context, exact=exact)
    for value in (*scores, *prior.score(z, times, noise, context, exact=exact)):
        assert not value.requires_grad
    assert attached.grad is None


# Checkpoints.


def test_ema_weights_take_precedence(state: dict) -> None:
    ema = state | {"net.learned_query": state["net.learned_query"] + 1}
    for checkpoint, expected in (
        ({"model": state, "ema_model": ema, "step": 3}, ema),
        ({"model": state, "optimizer": {"state": {}}}, state),
        ({"ema_model": ema}, ema),
    ):
        loaded = DiffusionPrior.from_state_dict(checkpoint)
        assert torch.equal(loaded.net.learned_query, expected["net.learned_query"])


def test_keys_of_the_clip_and_the_schedule_are_optional(state: dict, prior: DiffusionPrior) -> None:
    clip = {"clip.clip.visual.proj": torch.ones(3), "noise_scheduler.other": torch.ones(1)}
    bare = {k: v for k, v in state.items() if not k.startswith("noise_scheduler.")}
    for checkpoint in (state | clip, bare):
        loaded = DiffusionPrior.from_state_dict(checkpoint).state_dict()
        assert loaded.keys() == prior.state_dict().keys()
        for key, value in prior.state_dict().items():
            torch.testing.assert_close(loaded[key], value, rtol=2e-6, atol=1e-7)


def test_half_precision_weights_become_float32(state: dict) -> None:
    loaded = DiffusionPrior.from_state_dict({key: value.half() for key, value in state.items()})
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


QUERY = "net.causal_transformer.layers.1.0.to_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net.learned_query": None}, "missing: net.learned_query"),
        ({QUERY: None}, "unknown: .*layers.1.*"),
        ({"net.more": torch.ones(1)}, "unknown: net.more"),
        ({"more": torch.ones(1)}, "unknown: more"),
        (
            {QUERY: torch.ones(128, 32)},
            r"wrong shape: net\S+layers.1.0.to_q.weight is \(128, 32\), not \(256, 32\)",
        ),
        ({"net.learned_query": torch.ones(31)}, r"net.learned_query is \(31,\), not \(32,\)"),
        ({"net.to_time_embeds.0.weight": None}, "no 'net.to_time_embeds.0.weight'"),
        ({QUERY.replace("layers.1", "layers.0"): None}, "no 'net.causal.*layers.0.0.to_q.weight'"),
        ({"net.to_time_embeds.0.weight": torch.ones(1000)}, "not the weights of a diffusion prior"),
    ],
)
def test_mismatched_keys_are_named(state: dict, change: dict, message: str) -> None:
    changed = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(ModelError, match=message) as error:
        DiffusionPrior.from_state_dict(changed)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"state_dict": {"a": torch.ones(1)}}])
def test_other_checkpoints_are_refused(checkpoint: dict) -> None:
    with pytest.raises(ModelError, match="not the weights of a diffusion prior"):
        DiffusionPrior.from_state_dict(checkpoint)


def test_long_lists_of_missing_keys_are_cut(state: dict) -> None:
    few = {key: value for key, value in state.items() if "layers.1" not in key or "to_q" in key}
    with pytest.raises(ModelError, match=r"missing: .* and \d+ more$"):
        DiffusionPrior.from_state_dict(few)


@pytest.mark.parametrize(
    ("embed", "encodings", "mask"),
    [
        ((2, 31), (2, 77, 32), None),
        ((2, 32), (2, 77, 31), None),
        ((1, 32), (2, 77, 32), None),
        ((32,), (1, 77, 32), None),
        ((1, 32), (77, 32), None),
        ((1, 32), (1, 77, 32), (1, 76)),
        ((2, 32), (2, 77, 32), (1, 77)),
    ],
)
def test_texts_of_wrong_shapes_are_refused(
    prior: DiffusionPrior, embed: tuple, encodings: tuple, mask: tuple | None
) -> None:
    text_mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError):  # noqa: PT011
        prior.context(torch.ones(embed), torch.ones(encodings), text_mask=text_mask)
