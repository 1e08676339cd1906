"""Which layers refit solves, what it folds into them, which it solves together, and which it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.refit.units import Unit, find_units
from fxzip.passes.trace import trace
from tests.nets import Net, conv, permuted_copy
from tests.oracles import call, difference, images, randomise

X = images(12, 8)  # as wide as the layers have channels
WIDTH = 8


class Scaled(nn.Module):
    """A function of its input and a vector of parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.vector)


def body(m: Net, x: Tensor) -> Tensor:
    x = m.after(m.a(x)).relu()
    return m.head(m.b(x).relu().mean((2, 3)))


def around(after: nn.Module) -> Net:
    return Net(body, a=conv(3, WIDTH), after=after, b=conv(WIDTH, WIDTH), head=nn.Linear(WIDTH, 5))


def units(model: nn.Module, x: Any = X) -> dict[str, Unit]:
    """The units by the names of their layers' weights."""
    module = canonicalise(trace(model, (x,)))
    return {" ".join(layer.weight for layer in unit.layers): unit for unit in find_units(module)}


def check_exact(model: nn.Module, x: Any = X) -> fxzip.ZippedModel:
    zipped = fxzip.zip(model, permuted_copy(model, x), [x], method="permute", hold_back=False, progress=False)
    assert difference(call(model, x), call(zipped, x)[0]) < 1e-4
    for part in (zipped.trunk, *zipped.heads.values()):
        read = {str(n.target) for n in part.graph.nodes if n.op == "get_attr"}
        called = {str(n.target) for n in part.graph.nodes if n.op == "call_module"}
        assert all(name in read or name.rpartition(".")[0] in called for name in part.state_dict())
    return zipped


FOLDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a scale": lambda x, v: x * v[:, None, None],
    "a scale from the left": lambda x, v: v.reshape(1, -1, 1, 1) * x,
    "a scale of one": lambda x, v: x.mul(v.view(1, -1, 1, 1)),
    "a divisor": lambda x, v: x / v[:, None, None],
    "a bias": lambda x, v: torch.add(x, v[:, None, None]),
    "a number": lambda x, v: (x - 0.5) * 2,
    "two": lambda x, v: (x * v[:, None, None] - v[:, None, None]) / 3,
}


@pytest.mark.parametrize("name", FOLDED)
def test_lines_behind_a_layer_are_folded(name: str) -> None:
    model = randomise(around(Scaled(FOLDED[name])), X)
    assert len(units(model)["a.weight"].layers[0].chain) >= 1
    trunk = check_exact(model).trunk
    assert not [n for n in trunk.graph.nodes if n.op == "call_function"]
    assert sorted(n for n, _ in trunk.named_parameters()) == ["a.bias", "a.weight", "b.bias", "b.weight"]


APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "along the rows": lambda x, v: x * v,
    "over a number": lambda x, v: 1 / (x.square() + 1),
    "for each pixel": lambda x, v: x + v[:, None] * v,
    "of itself": lambda x, v: x * x,
}


@pytest.mark.filterwarnings("ignore::fxzip.errors.FrozenSpaceWarning")
@pytest.mark.parametrize("name", APART)
def test_what_differs_within_a_channel_is_not_folded(name: str) -> None:
    model = randomise(around(Scaled(APART[name])), X)
    assert units(model)["a.weight"].layers[0].chain == ()
    check_exact(model)


def test_a_batch_norm_over_another_axis_is_not_folded() -> None:
    def tokens(m: Net, x: Tensor) -> Tensor:
        return m.head(m.norm(m.a(x)).relu().mean(1))

    x = torch.randn(12, WIDTH, 3, dtype=torch.float64)
    model = Net(tokens, a=nn.Linear(3, WIDTH), norm=nn.BatchNorm1d(WIDTH), head=nn.Linear(WIDTH, 5))
    model = randomise(model, x)
    assert units(model, x)["a.weight"].layers[0].chain == ()
    check_exact(model, x)


def test_sums_of_layers_of_one_size_are_solved_together() -> None:
    def sums(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        small = m.c(x.mean((2, 3), keepdim=True))
        return m.head((m.b(x) + small + x).relu().mean((2, 3)))

    layers = {"a": conv(3, WIDTH), "b": conv(WIDTH, WIDTH), "c": conv(WIDTH, WIDTH, 1), "head": nn.Linear(WIDTH, 5)}
    model = randomise(Net(sums, **layers), X)
    found = units(model)
    assert set(found) == {"a.weight", "b.weight", "c.weight", "head.weight"}
    assert [n.name for n in found["b.weight"].known] == ["c", "relu"]
    check_exact(model)


def test_a_layer_that_is_added_to_itself_is_solved_alone() -> None:
    def doubled(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head((y + y).relu().mean((2, 3)))

    model = randomise(Net(doubled, a=conv(3, WIDTH), head=nn.Linear(WIDTH, 5)), X)
    assert units(model)["a.weight"].root.name == "a"
    check_exact(model)


def product(m: Net, x: Tensor) -> Tensor:
    return m.b(x).flatten(2) @ m.b(x).flatten(2).transpose(1, 2)


def added(m: Net, x: Tensor) -> Tensor:
    x = m.a(x).mean((2, 3))
    return m.head(torch.addmm(x, x, m.b.weight).relu())


def twice(m: Net, x: Tensor) -> Tensor:
    return m.head(m.b(m.b(m.a(x)).relu()).relu().mean((2, 3)))


def tied(m: Net, x: Tensor) -> Tensor:
    return m.head(F.conv2d(m.b(m.a(x)).relu(), m.b.weight, padding=1).relu().mean((2, 3)))


def sized(m: Net, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x), output_size=(16, 16)).relu().mean((2, 3)))


def unbatched(m: Net, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    return m.head((x + m.b(x.mean(0))).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "b"),
    [
        (product, conv(3, WIDTH)),
        (added, nn.Linear(WIDTH, WIDTH)),
        (twice, conv(WIDTH, WIDTH)),
        (tied, conv(WIDTH, WIDTH)),
        (sized, nn.ConvTranspose2d(WIDTH, WIDTH, 3, 2, 1)),
        (unbatched, conv(WIDTH, WIDTH)),
    ],
)
def test_other_layers_are_left_to_the_papers_rule(forward: Callable[..., Tensor], b: nn.Module) -> None:
    model = randomise(Net(forward, a=conv(3, WIDTH), b=b, head=nn.Linear(WIDTH, 5)), X)
    assert "b.weight" not in " ".join(units(model)).split()
