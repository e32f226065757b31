"""Batch norm folded into convolutions for training: the same function, and the same tensors after."""

import pytest
import timm
import torch
from torch import nn

from train.models.folding import folded


def randomised(name):
    """Build a model of timm whose batch norms have statistics and weights of every size."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return model


# In resnetv2 some batch norms come before the convolution: these stay.
@pytest.mark.parametrize(
    ("name", "left"), [("test_efficientnet", 0), ("test_resnet", 0), ("resnetv2_18", 9)]
)
@torch.no_grad()
def test_function_stays_and_what_was_trained_comes_back(name, left):
    model, images = randomised(name), torch.rand(2, 3, 64, 64)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    before = model(images)
    with folded(model, images):
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert len(norms) == left
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        for parameter in model.parameters():
            parameter *= 1.01
        trained = model(images)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(model(images), trained, rtol=1e-4, atol=1e-4)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_model_without_batch_norm_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    bias = model[0].bias
    with folded(model, torch.rand(1, 3, 8, 8)):
        pass
    assert model[0].bias is bias


def test_failure_inside_restores_the_model():
    model = randomised("test_resnet")
    keys = set(model.state_dict())
    with pytest.raises(KeyboardInterrupt), folded(model, torch.rand(1, 3, 64, 64)):
        raise KeyboardInterrupt
    assert set(model.state_dict()) == keys
