"""Attention maps and losses against the golden values, and against finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train.attention import attention_map, complementary_attention_map
from train.losses import tga_terms

VIEWS = ("adv_target", "clean_original", "clean_target")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parent / "vectors" / "tga_losses.npz") as arrays:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def maps(golden: dict[str, torch.Tensor], kind: str) -> list[torch.Tensor]:
    """The maps of the three views; kind is "" or "comp_"."""
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
    for view, found in zip(VIEWS, maps(golden, kind), strict=True):
        torch.testing.assert_close(found, golden[f"{kind}map_{view}"], rtol=1e-5, atol=1e-6)


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


def test_what_does_not_fit_is_refused() -> None:
    tokens, text = torch.randn(2, 10, 6), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"expected tokens \(B, 1 \+ P, D\)"):
        attention_map(tokens, text[:1], 9)
    with pytest.raises(ValueError, match="a square of patches, got 9 tokens"):
        attention_map(tokens[:, :9], text, 9)
    attention = attention_map(tokens, text, 9)
    arguments = (torch.randn(2, 3), torch.tensor([0, 1]), attention, attention, attention)
    with pytest.raises(ValueError, match="alpha and beta must be 0 or more"):
        tga_terms(*arguments, alpha=-0.1, beta=0.0)
    with pytest.raises(ValueError, match="distance must be one of l2, l1, cos"):
        tga_terms(*arguments, alpha=0.1, beta=0.1, distance="l3")
