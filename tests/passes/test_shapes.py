"""Shapes at batch 1: read off the trace they are those that running gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip.passes.analyse import shapes
from fxzip.passes.analyse.shapes import propagate_shapes
from fxzip.passes.trace import trace


class Net(nn.Module):
    """Sizes that are computed from the batch, a device that is asked for, an output of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, _, h, w = x.shape
        x = self.conv(x).reshape(b * 2, 4, h, w)
        x = x.view(b, 8, h * w).transpose(1, 2)
        x = torch.cat([self.token.expand(b, -1, -1), x, torch.zeros(b, 1, 8, device=x.device)], 1)
        values, _ = x.max(1)
        return self.lstm(x)[0], values


def sizes(values: dict[str, Any]) -> dict[str, Any]:
    def size(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        return [size(part) for part in value] if isinstance(value, (tuple, list)) else value

    return {name: size(value) for name, value in values.items()}


def test_what_is_read_is_what_runs() -> None:
    traced = trace(Net().eval(), (torch.randn(4, 3, 6, 6),))
    read = sizes(propagate_shapes(traced, (torch.randn(1, 3, 6, 6),), {}))
    traced.meta["traced_by"] = "given"
    assert read == sizes(propagate_shapes(traced, (torch.randn(1, 3, 6, 6),), {}))


def test_little_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(Net().eval(), (torch.randn(4, 3, 6, 6),))
    ran: list[str] = []
    run_node = shapes._Shapes.run_node
    monkeypatch.setattr(shapes._Shapes, "run_node", lambda self, n: ran.append(n.op) or run_node(self, n))
    propagate_shapes(traced, (torch.randn(1, 3, 6, 6),), {})
    assert "call_module" not in ran
    assert "placeholder" not in ran


class Fully(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


def test_inputs_of_another_size_are_run() -> None:
    traced = trace(Fully().eval(), (torch.randn(2, 3, 6, 6),))
    found = propagate_shapes(traced, (torch.randn(1, 3, 10, 12),), {})
    assert found["conv"].shape == (1, 8, 10, 12)


def test_a_wrong_keyword_is_named() -> None:
    traced = trace(Fully().eval(), (torch.randn(2, 3, 6, 6),))
    with pytest.raises(TypeError, match="y; it takes x"):
        propagate_shapes(traced, (), {"y": torch.randn(1, 3, 6, 6)})


def test_analysis_of_a_given_graph_is_that_of_its_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    spec, again = fxzip.analyse(model, x), fxzip.analyse(torch.fx.symbolic_trace(model), x)
    assert [(s.name, s.size, len(s.sites)) for s in spec.spaces] == [("0", 8, 7)]
    assert [(s.size, len(s.sites)) for s in again.spaces] == [(8, 7)]
