"""Tokens of convolutional towers against open_clip's tower on maps of one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn

from edgeclip.manifest import TokenSpec
from train.models.towers import PooledImageEncoder, image_encoder

SIZE = (64, 96)  # feature maps of 2 x 3
DIM = 24


class Model(nn.Module):
    """Part of an open_clip model that an image encoder needs."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, pixels: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert not normalize
        return self.visual(pixels)


def tower(name: str, pool: str = "avg", proj: str = "linear", **settings: Any) -> TimmModel:
    """Create a tower of timm with random weights and random statistics of batch norm."""
    torch.manual_seed(1)
    visual = TimmModel(name, DIM, SIZE, pool=pool, proj=proj, **settings)
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return visual.eval().requires_grad_(False)


def pictures() -> torch.Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))


TOWERS = [
    ("test_efficientnet", "linear", 1),
    ("test_efficientnet", "mlp", 1),
    ("test_efficientnet", "", 1),  # the trunk's classifier is the projection
    ("test_convnext", "linear", 1),  # a norm after its pooling
    ("test_resnet", "none", 1),
    ("test_byobnet", "mlp", 1),  # the kind of MobileOne
    ("mobilenetv3_small_050", "", 1),  # a convolution and an activation after its pooling
    ("test_mambaout", "", 3),  # channels last
]


@pytest.mark.parametrize(("name", "proj", "channels"), TOWERS)
def test_a_token_is_the_embedding_of_an_image_full_of_its_place(
    name: str, proj: str, channels: int
) -> None:
    visual, pixels = tower(name, proj=proj), pictures()
    encoder, spec = image_encoder(Model(visual))
    assert spec == TokenSpec((2, 3), 0)
    with torch.no_grad():
        embedding, tokens = encoder(pixels)
        assert torch.equal(embedding, visual(pixels))
        features = visual.trunk.forward_features(pixels)
        for index, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
            place = features[:, :, row, column, None, None]
            if channels == 3:
                place = features[:, row, column, None, None]
            full = visual.head(visual.trunk.forward_head(place.expand_as(features)))
            torch.testing.assert_close(tokens[:, index], full, rtol=1e-4, atol=1e-5)
    assert tokens.shape == (3, 6, embedding.shape[1])
    if proj != "mlp" and name in ("test_efficientnet", "test_resnet"):  # linear after the pooling
        torch.testing.assert_close(tokens.mean(1), embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "visual",
    [
        lambda: tower("test_efficientnet", pool="rot_attn", proj=""),
        lambda: tower("test_resnet", pool="max"),
        lambda: tower("test_resnet", pool="avgmax"),
        lambda: tower("test_vit", pool="avg"),
        lambda: ModifiedResNet([1, 1, 1, 1], DIM, 2, image_size=64, width=8).eval(),
    ],
    ids=["attention", "maximum", "average and maximum", "ViT", "open_clip's ResNet"],
)
def test_other_poolings_give_no_tokens(visual: Any) -> None:
    model = Model(visual())
    size = (64, 64) if isinstance(model.visual, ModifiedResNet) else model.visual.image_size
    encoder, spec = image_encoder(model)
    assert (type(encoder), spec) == (PooledImageEncoder, None)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (embedding,) = encoder(pixels)
        assert torch.equal(embedding, model.visual(pixels))


def test_a_head_that_ignores_random_maps_still_gives_tokens() -> None:
    visual = tower("test_efficientnet", proj="mlp")
    visual.head.mlp.fc1.bias.fill_(-1e3)  # as in an aligned classifier, far below its threshold
    assert image_encoder(Model(visual))[1] == TokenSpec((2, 3), 0)


def test_the_search_for_a_feature_map_leaves_weights_and_random_numbers() -> None:
    visual = tower("test_efficientnet")
    before = {key: value.clone() for key, value in visual.state_dict().items()}
    torch.manual_seed(3)
    image_encoder(Model(visual))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())


def test_weights_have_the_names_of_a_tower_without_tokens() -> None:
    """Check that a run of an earlier version, without tokens of convolutions, can be resumed."""
    model = Model(tower("test_efficientnet"))
    encoder, _ = image_encoder(model)
    assert encoder.state_dict().keys() == PooledImageEncoder(model).state_dict().keys()


def test_gradients_reach_batch_norm_in_eval_mode() -> None:
    visual, pixels = tower("test_efficientnet").requires_grad_(True), pictures()
    encoder, _ = image_encoder(Model(visual))
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    statistics = [norm.running_mean.clone() for norm in norms]
    _, tokens = encoder(pixels)
    tokens[:, 0].square().sum().backward()  # of one place
    assert norms
    for norm, mean in zip(norms, statistics, strict=True):
        assert norm.weight.grad.abs().sum() > 0
        assert norm.bias.grad.abs().sum() > 0
        assert torch.equal(norm.running_mean, mean)
