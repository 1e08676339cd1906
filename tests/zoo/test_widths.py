"""Widths on real architectures: dead channels and copies of channels change nothing, in float64."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier, fixed_sizes
from fxzip.testing import TOLERANCE, dropping_error, images, padding_error, randomise

MODELS = {
    "test_resnet": 1.0,
    "test_convnext": 0.6,
    "test_efficientnet": 1.0,
    "test_vit": 0.9,
    "test_nfnet": 1.0,
    "test_byobnet": 1.0,
    "test_mambaout": 0.7,
    "starnet_s050": 1.0,
    "mobilenetv3_small_050": 1.0,
    "regnetx_002": 1.0,
    "squeezenet1_1": 1.0,
    "shufflenet_v2_x0_5": 0.2,
}
"""The share of the families of channel spaces that can have other numbers of channels, at the least."""


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith(("squeezenet", "shufflenet")):
        return torchvision.models.get_model(name, weights=None, num_classes=10)
    return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize("name", MODELS)
def test_other_numbers_of_channels_are_exact(name: str) -> None:
    made = make(name)
    x = images(2, 160 if name == "test_vit" else 64)
    model = randomise(made, x)
    module = canonicalise(trace(model, (x,)))
    spec = analyse_graph(module, (x,), {})
    fixed = fixed_sizes(Verifier(module, ((x,), {})), spec)
    roots = [space for space in spec.spaces if space.parent is None]
    assert 1 - len(fixed) / len(roots) >= MODELS[name], fixed
    assert padding_error(model, x, fixed=fixed) < TOLERANCE
    assert dropping_error(model, x, fixed=fixed) < TOLERANCE
