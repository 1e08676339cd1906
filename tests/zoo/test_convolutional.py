"""Oracles 1 to 5 of the design on real convolutional architectures with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxzip
from tests.oracles import TOLERANCE, images, mutations_missed, permutation_error, randomise, self_zip_errors

MODELS = [
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:vgg11_bn",
    "torchvision:vgg11",
    "torchvision:densenet121",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:googlenet",
    "torchvision:regnet_x_400mf",
    "torchvision:resnext50_32x4d",
    "torchvision:convnext_tiny",
    "torchvision:efficientnet_b0",
    "torchvision:squeezenet1_1",
    "timm:resnet18d",
    "timm:res2net50_26w_4s",
    "timm:ghostnet_100",
    "timm:resnetv2_50",
    "timm:resnetv2_50x1_bit",
    "timm:repvgg_a0",
    "timm:hrnet_w18_small",
    "timm:seresnet18",
    "timm:dla34",
    "timm:cspresnet50",
]
SIZE = 64


def make(name: str) -> nn.Module:
    """A model of torchvision or timm with random weights."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(model)
    import torchvision

    extra = {"init_weights": False} if model == "googlenet" else {}
    found = torchvision.models.get_model(model, weights=None, **extra)
    if model.startswith("vgg"):  # as it is, but narrow: 4096 wide its classifier takes 0.8 GB a copy in float64
        narrow = (nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        found.classifier = nn.Sequential(*narrow)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_oracles(name: str) -> None:
    x = images(8, SIZE)
    model = randomise(make(name), x)
    spec = fxzip.analyse(model, x[:2])
    assert spec.coverage >= 0.99
    assert not spec.frozen
    assert permutation_error(model, x[:2], spec) < TOLERANCE
    assert mutations_missed(spec.permute(model), x[:1], spec, most=4) == []
    errors = self_zip_errors(model, x, spec, cuts=(None, 0.0), methods=("permute", "zip"))
    assert errors[None] < TOLERANCE, errors
    assert errors[0.0] == 0.0
