"""Attention maps and losses against the golden values, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.paths import VECTORS
from train.attention import attention_map, complementary_attention_map
from train.losses import divergence, pmg_terms, squared_distance, tga_terms

VIEWS = ("adv_target", "clean_original", "clean_target")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(VECTORS / "tga_losses.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def maps(golden: dict[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Return the maps of the three views; kind is "" or "comp_"."""
    text, non_class = (golden[name][golden["labels"]] for name in ("text", "non_class_text"))
    size = int(golden["image_size"])
    if kind:
        return [
            complementary_attention_map(golden[f"tokens_{view}"], text, non_class, size)
            for view in VIEWS
        ]
    return [attention_map(golden[f"tokens_{view}"], text, size) for view in VIEWS]


@pytest.mark.parametrize("kind", ["", "comp_"])
def test_maps_are_the_published_ones(golden: dict[str, torch.Tensor], kind: str) -> None:
    for view, actual in zip(VIEWS, maps(golden, kind), strict=True):
        torch.testing.assert_close(actual, golden[f"{kind}map_{view}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["", "comp_"])
@pytest.mark.parametrize("distance", ["l2", "l1", "cos"])
def test_losses_are_the_published_ones(
    golden: dict[str, torch.Tensor], kind: str, distance: str
) -> None:
    terms = tga_terms(
        golden["logits_adv"],
        golden["labels"],
        *maps(golden, kind),
        alpha=float(golden["alpha"]),
        beta=float(golden["beta"]),
        distance=distance,
    )
    torch.testing.assert_close(
        torch.stack(terms), golden[f"{kind}loss_{distance}"], rtol=1e-5, atol=0
    )


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    clean = torch.randn(2, 10, 6, dtype=torch.float64)
    text, other = (torch.nn.functional.normalize(torch.randn(2, 6).double(), dim=1) for _ in "ab")
    logits, labels = torch.randn(2, 3).double(), torch.tensor([0, 2])

    def loss(tokens: torch.Tensor, kind: int) -> torch.Tensor:
        def attention(t: torch.Tensor) -> torch.Tensor:
            if kind:
                return complementary_attention_map(t, text, other, 9)
            return attention_map(t, text, 9)

        views = (attention(tokens), attention(clean), attention(tokens * 1.1 + 0.1))
        return sum(tga_terms(logits, labels, *views, alpha=0.3, beta=0.2))

    for kind in (0, 1):
        assert torch.autograd.gradcheck(lambda t, k=kind: loss(t, k), tokens)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_count_in_the_norm_alone(prefix: int) -> None:
    """Compare with a plain loop over the published definition."""
    rng = np.random.default_rng(0)
    tokens, text = rng.normal(size=(2, prefix + 9, 6)), rng.normal(size=(2, 6))
    actual = attention_map(torch.tensor(tokens), torch.tensor(text), 3, prefix=prefix)
    for i in range(2):
        scaled = tokens[i] / np.sqrt((tokens[i] ** 2).sum(0))
        scores = np.array([patch @ text[i] for patch in scaled[prefix:]])
        expected = (scores - scores.min()) / (scores.max() - scores.min())
        np.testing.assert_allclose(actual[i, 0].numpy().ravel(), expected, rtol=1e-12)


def test_image_of_equal_patches_has_no_attention() -> None:
    tokens = torch.ones(1, 10, 6, requires_grad=True)
    actual = attention_map(tokens, torch.full((1, 6), 6**-0.5), 9)
    actual.sum().backward()
    assert (actual == 0).all()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_pmg_terms_equal_plain_sums() -> None:
    rng = np.random.default_rng(0)
    adv, reference, clean = (rng.normal(size=(4, 5)) * 3 for _ in range(3))
    labels = np.array([0, 4, 2, 2])

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return float((p * np.log(p / q)).sum(1).mean())

    p = softmax(adv)
    expected = [
        -np.log(p[np.arange(4), labels]).mean(),
        0.5 * kl(softmax(reference), p),
        2.0 * kl(softmax(clean), p),
    ]
    arrays = (torch.tensor(x) for x in (adv, labels, reference, clean))
    actual = pmg_terms(*arrays, alpha=0.5, beta=2.0)
    np.testing.assert_allclose([term.item() for term in actual], expected, rtol=1e-10)


def test_divergence_and_its_gradient_equal_plain_sums() -> None:
    """Check KL in float64 for sharp logits, with its gradient q - p by the trained logits."""
    rng = np.random.default_rng(0)
    trained, original = (rng.normal(size=(4, 7)) * 20 for _ in range(2))
    p, q = (np.exp(x - np.logaddexp.reduce(x, 1)[:, None]) for x in (original, trained))
    logits = torch.tensor(trained, requires_grad=True)
    actual = divergence(logits, torch.tensor(original))
    actual.sum().backward()
    np.testing.assert_allclose(actual.detach(), (p * np.log(p / q)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(logits.grad, q - p, rtol=1e-9, atol=1e-15)
    assert divergence(logits, logits).tolist() == [0.0] * 4


def test_divergence_over_similar_classes_equals_plain_sums() -> None:
    """Check that both distributions are multiplied, and that a change between equal classes is none."""
    rng = np.random.default_rng(0)
    trained, original = (rng.normal(size=(4, 7)) * 3 for _ in range(2))
    similar = rng.dirichlet(np.ones(7), 7)
    p, q = (np.exp(x - np.logaddexp.reduce(x, 1)[:, None]) @ similar for x in (original, trained))
    actual = divergence(*(torch.tensor(x) for x in (trained, original, similar)))
    np.testing.assert_allclose(actual, (p * np.log(p / q)).sum(1), rtol=1e-10)
    same = torch.full((2, 2), 0.5)
    one, other = torch.tensor([[3.0, -1.0]]), torch.tensor([[-1.0, 3.0]])
    assert divergence(one, other, same).item() == pytest.approx(0, abs=1e-6)
    assert divergence(one, other).item() > 1


def test_squared_distance_of_each_image() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert squared_distance(a, b).tolist() == [4.0, 25.0]


def test_wrong_shapes_and_weights_are_refused() -> None:
    tokens, text = torch.randn(2, 10, 6), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"expected tokens \(B, prefix \+ P, D\)"):
        attention_map(tokens, text[:1], 9)
    with pytest.raises(ValueError, match="expected 1 tokens and a square of patches, got 9"):
        attention_map(tokens[:, :9], text, 9)
    attention = attention_map(tokens, text, 9)
    arguments = (torch.randn(2, 3), torch.tensor([0, 1]), attention, attention, attention)
    with pytest.raises(ValueError, match="alpha and beta must be 0 or more"):
        tga_terms(*arguments, alpha=-0.1, beta=0.0)
    with pytest.raises(ValueError, match="distance must be one of l2, l1, cos"):
        tga_terms(*arguments, alpha=0.1, beta=0.1, distance="l3")
