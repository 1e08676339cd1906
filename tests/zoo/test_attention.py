"""A sample of what is hard in timm's zoo, a small network for each kind; all of it is ``make zoo``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.models.coat import CoaT
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn

import fxzip
from tests.oracles import TOLERANCE, images, mutations_missed, permutation_error, randomise, self_zip_errors

IMAGE = {"img_size": 32, "num_classes": 7}
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "windows and shifts, position tables": (
        partial(SwinTransformer, patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, **IMAGE),
        32,
    ),
    "attention of channels, class attention": (
        partial(Xcit, patch_size=8, embed_dim=16, depth=2, num_heads=2, cls_attn_layers=1, eta=1.0, **IMAGE),
        32,
    ),
    "mixed tokens": (partial(MlpMixer, patch_size=8, num_blocks=2, embed_dim=16, **IMAGE), 32),
    "class tokens, layer scale": (partial(timm.create_model, "test_vit", num_classes=7), 64),
    "register tokens": (
        partial(VisionTransformer, patch_size=8, embed_dim=16, depth=2, num_heads=2, reg_tokens=3, **IMAGE),
        32,
    ),
    "position tables by a network": (partial(timm.create_model, "test_vit_relpos", num_classes=7), 160),
    "scales that are weighed": (
        partial(
            CoaT, patch_size=4, embed_dims=(32, 32, 32, 32), serial_depths=(1, 1, 1, 1), parallel_depth=1, num_heads=8,
            mlp_ratios=(2, 2, 2, 2), **{**IMAGE, "img_size": 64},
        ),
        64,
    ),
    "convolutions and grids of windows": (partial(timm.create_model, "test_coatnet", num_classes=7), 160),
    "layer scale, norms over channels": (partial(timm.create_model, "test_convnext", num_classes=7), 64),
    "standardised weights with gains": (partial(timm.create_model, "test_nfnet", num_classes=7), 64),
    "gates and bottlenecks": (partial(timm.create_model, "test_byobnet", num_classes=7), 64),
    "gated convolutions": (partial(timm.create_model, "test_mambaout", num_classes=7), 64),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_oracles(name: str) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    x = images(6, size)
    model = randomise(make(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.FrozenSpaceWarning)
        spec = fxzip.analyse(model, x[:2])
    assert spec.coverage >= 0.95, str(spec)
    assert permutation_error(model, x[:2], spec) < TOLERANCE
    assert mutations_missed(spec.permute(model), x[:1], spec, most=4) == []
    errors = self_zip_errors(model, x, spec, cuts=(None, 0.0), methods=("permute", "zip"))
    assert max(errors.values()) < TOLERANCE, errors
    assert errors[0.0] == 0
