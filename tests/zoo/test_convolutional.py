"""Oracles 1 to 5 of the design on real convolutional architectures with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxzip
from tests.oracles import TOLERANCE, images, mutations_missed, permutation_error, randomise, self_zip_errors

SHALLOW = {"layers": (1, 1, 1, 1)}
MODELS: dict[str, dict[str, Any]] = {
    "torchvision:resnet18": {},
    "torchvision:vgg11_bn": {},
    "torchvision:mobilenet_v3_small": {},
    "torchvision:shufflenet_v2_x0_5": {},
    "torchvision:squeezenet1_1": {},
    "timm:resnet18d": SHALLOW,
    "timm:resnet50": SHALLOW,
    "timm:seresnet18": SHALLOW,
    "timm:resnext50_32x4d": SHALLOW,
    "timm:res2net50_26w_4s": SHALLOW,
    "timm:resnetv2_50": SHALLOW,
    "timm:densenet121": {"block_config": (2, 2, 2, 2)},
    "timm:convnext_atto": {"depths": (1, 1, 1, 1)},
    "timm:regnetx_002": {},
    "timm:ghostnet_050": {},
    "timm:repvgg_a0": {},
}
"""Of each kind a small or shallow one; the zoo's own depths are in ``make zoo``."""
SIZE = 64


def make(name: str) -> nn.Module:
    """A model of torchvision or timm with random weights."""
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(model, **MODELS[name])
    import torchvision

    found = torchvision.models.get_model(model, weights=None)
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
