"""Merged weights in the models' own classes: ``python -m benchmarks.own_classes [MODEL ...]``.

Two networks of an architecture with random weights (`fxzip.testing.randomise`) are merged with refit, and put back by
``as_models``. A row has how far the models are off the merged network on other images, as a share of its largest
output; whether all keys are the originals'; and the memory of both models in multiples of one and of the other's head.
Or it has the error, which names what has no place in the class. Rows are kept as they come.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.runs import Kept, Row
from benchmarks.lib.zoo_models import make
from fxzip.testing import randomise

REFIT = fxzip.RefitOptions(rounds=0, ridge=1e-2, samples=512, biases=False)
SIDES = {"resnet18": 64, "skresnet18": 64, "densenet121": 64, "googlenet": 96, "repvgg_a0": 64, "dla34": 64}
"""Sides of the images where they are not a model's own, or 64."""
TIMM = (
    "test_byobnet test_convnext test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos "
    "test_mambaout test_nfnet test_resnet test_vit test_vit2 test_vit4 resnet18 skresnet18 resnetv2_18 "
    "mobilenetv3_small_050 ghostnet_050 regnetx_002 repvgg_a0 convnext_atto mixer_s32_224 pit_ti_224 levit_128s "
    "edgenext_xx_small mobilevit_xxs deit_tiny_patch16_224 cait_xxs24_224 poolformerv2_s12 vgg11_bn"
).split()
TORCHVISION = "resnet18 mobilenet_v2 shufflenet_v2_x0_5 squeezenet1_1 densenet121 mnasnet0_5 regnet_y_400mf".split()
MODELS = [f"timm:{name}" for name in TIMM] + [f"torchvision:{name}" for name in TORCHVISION]


def check(name: str) -> Row:
    """The row of one architecture."""
    began = time.perf_counter()
    row: Row = {"model": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row |= _checked(name)
        except fxzip.FxzipError as error:
            row |= {"error": " ".join(str(error).split())}
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def _checked(name: str) -> Row:
    pattern = make(name)
    side = _side(name, pattern)
    images, others = (torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    models = [randomise(pattern, images, seed).float() for seed in range(2)]
    zipped = fxzip.zip(*models, [images], method="select", refit=REFIT, hold_back=False, verify=False, progress=False)
    made = zipped.as_models()
    with torch.no_grad():
        expected = zipped(others)
        off = max(_off(a, model(others)) for a, model in zip(expected, made.values(), strict=True))
    keys = all(a.state_dict().keys() == b.state_dict().keys() for a, b in zip(models, made.values(), strict=True))
    heads = sum(p.numel() for p in zipped.head(zipped.names[1]).parameters())
    tensors = {p.data_ptr(): p.numel() for model in made.values() for p in model.parameters()}
    memory = sum(tensors.values()) / (sum(p.numel() for p in models[0].parameters()) + heads)
    return {"off": off, "keys": keys, "memory": round(memory, 4)}


def _off(expected: Any, found: Any) -> float:
    pairs = list(zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _side(name: str, model: nn.Module) -> int:
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 64, 64))[-1]
    fixed = bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    return SIDES.get(name.partition(":")[2], own if fixed or own < 200 else 64)


def main() -> None:
    """Check the models that have no row yet."""
    line = CommandLine(__doc__)
    line.parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="default: all")
    options = line.results("own_classes").read()
    about = {"command": "python -m benchmarks.own_classes", "versions": {"torch": torch.__version__}}
    kept = Kept(options.json, about, ("model",))
    kept.extend(check(name) for name in options.models if (name,) not in kept)


if __name__ == "__main__":
    main()
