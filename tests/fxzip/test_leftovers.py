"""Merge after merge in one process: nothing is left behind but the results, as long as they are there."""

from __future__ import annotations

import gc
import inspect
import linecache
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxzip
from fxzip import RefitOptions

X = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    front = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*front, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def merge(number: int) -> fxzip.ZippedModel:
    options: dict[str, Any] = {"refit": RefitOptions(rounds=1), "method": "zip", "progress": False}
    return fxzip.zip(net(number), net(number + 100), [X[:12], X[12:]], **options)


def held() -> dict[str, int]:
    """How many there are of what may pile up."""
    gc.collect()
    kinds = (nn.Module, torch.Tensor, ShapeEnv)
    alive = gc.get_objects()
    found = {kind.__name__: sum(issubclass(type(each), kind) for each in alive) for kind in kinds}
    found |= {"sources": len(graph_module._loader.eval_cache), "lines": len(linecache.cache)}
    found |= {"threads": threading.active_count(), "files": len(list(Path("/proc/self/fd").iterdir()))}
    found["asked"] = ShapeEnv.get_axioms.cache_info().currsize  # type: ignore[attr-defined]
    return found | {"hooks": len(nn.modules.module._global_forward_hooks), "environment": len(os.environ)}


def test_many_merges_leave_nothing() -> None:
    """What torch's own bounded caches hold is there after some of them."""
    start = held()["ShapeEnv"]  # other tests leave some
    for number in range(12):
        merge(number)
    before = held()
    for number in range(12, 30):
        merge(number)
    after = held()
    grown = {name: (before[name], after[name]) for name in before if after[name] > before[name]}
    grown.pop("ShapeEnv", None)
    assert grown == {}
    assert after["ShapeEnv"] - start < 60  # two for each merge without it; torch's sums of sizes remember some
    assert after["asked"] == 0


def test_a_result_keeps_its_source() -> None:
    zipped = merge(0)
    assert "def forward" in inspect.getsource(type(zipped.trunk).forward)
    name = type(zipped.trunk).forward.__code__.co_filename
    assert name in graph_module._loader.eval_cache
    del zipped
    gc.collect()
    assert name not in graph_module._loader.eval_cache
    assert name not in linecache.cache
