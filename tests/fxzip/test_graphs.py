"""Facts about the nodes of a graph: each is decided in one place."""

import ast
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.graphs import bind_inputs, call_writes, is_random, is_relu, placeholders, writes_in_place
from fxzip.passes.trace import trace

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten

WRITES = [
    *("relu_", "add_", "copy_", "__iadd__", "__setitem__", "masked_fill_"),
    *(Tensor.mul_, torch.relu_, F.relu_, operator.setitem, operator.iadd, operator.ior),
    *(aten.relu_.default, aten.add_.Tensor, aten.copy_.default),
]
PURE = [
    operator.and_,
    operator.or_,
    "relu",
    "__add__",
    "__len__",
    Tensor.mul,
    torch.relu,
    F.relu,
    operator.add,
    aten.relu.default,
    aten.add.Tensor,
]


def test_what_writes_in_place() -> None:
    assert [target for target in WRITES if not call_writes(target)] == []
    assert [target for target in PURE if call_writes(target)] == []


def test_arguments_say_it_too() -> None:
    x = torch.zeros(2)
    assert call_writes(F.relu, (x, True))
    assert call_writes(F.relu, (x,), {"inplace": True})
    assert not call_writes(F.relu, (x, False))
    assert call_writes(torch.add, (x, x), {"out": x})
    assert not call_writes(torch.add, (x, x), {"out": None})


def test_modules_say_it_too() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU(inplace=True), nn.ReLU()))
    assert [writes_in_place(node, traced) for node in traced.graph.nodes] == [False, True, False, False]


def test_what_is_random() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    rows = [
        (torch.randn_like, (x,), {}, True),
        (aten.rand_like.default, (x,), {}, True),
        (torch.rand, (2, 3), {}, True),
        (F.dropout, (x,), {}, True),
        (F.dropout, (x, 0.1, False), {}, False),
        (F.dropout, (x,), {"training": False}, False),
        (F.scaled_dot_product_attention, (x, x, x), {"dropout_p": 0.1}, True),
        (F.scaled_dot_product_attention, (x, x, x), {}, False),
        (torch.relu, (x,), {}, False),
    ]
    for target, args, kwargs, random in rows:
        assert is_random(graph.call_function(target, args, kwargs), nn.Module()) == random, target
    assert is_random(graph.call_method("uniform_", (x,)), nn.Module())


class Relus(nn.Module):
    """A ReLU in each of its forms, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        x = F.relu(x - 0.1)
        x = torch.relu(x - 0.1)
        x = (x - 0.1).relu()
        x = torch.ops.aten.relu.default(x - 0.1)
        return F.gelu(F.relu6(x - 0.1))


def test_a_relu_is_one_in_every_form() -> None:
    traced = trace(Relus(), (torch.randn(2, 3),))
    assert sum(is_relu(traced, node) for node in traced.graph.nodes) == 5


def test_inputs_are_bound_by_name_and_place() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
            return x + y * scale

    traced = fx.symbolic_trace(Two())
    x, y, scale = placeholders(traced)
    assert bind_inputs(traced, (1,), {"y": 2}) == {x: 1, y: 2, scale: 2.0}
    with pytest.raises(TypeError, match="takes no input z; it takes x, y, scale"):
        bind_inputs(traced, (1, 2), {"z": 3})
    with pytest.raises(TypeError, match="input y is missing"):
        bind_inputs(traced, (1,), {})
    with pytest.raises(TypeError, match="4 inputs were given"):
        bind_inputs(traced, (1, 2, 3, 4), {})


GROUND = {
    *("writes_in_place", "call_writes", "is_static", "static_value", "attribute", "placeholders", "bind_inputs"),
    *("nodes_by_name", "free_name", "new_parameter", "parameter_uses", "learned", "is_relu", "is_random", "has_effect"),
    *("named_call", "linear_of", "norm_of", "does_nothing", "is_fresh"),
}
OLD = {"_has_effect", "mutates", "writes", "_is_relu", "_attribute", "_placeholders", "in_order", "_feed", "_free"}


def test_each_fact_is_decided_once() -> None:
    """Nothing but fxzip/graphs.py defines one of its names, and the old ones are gone."""
    found: dict[str, list[str]] = {}
    for folder in ("fxzip", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            if "fxzip/passes" in path.as_posix():
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found[name] for name in GROUND} == {name: ["fxzip/graphs.py"] for name in GROUND}
    assert not OLD & found.keys()
