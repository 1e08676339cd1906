"""The norms that stand alone: the line of least squares for each channel, whatever way they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.refit.norms import scale_and_shift
from tests.nets import Net, pair, permuted_copy
from tests.oracles import call, difference, randomise, recorded

WIDTH = 8


class Written(nn.Module):
    """A norm that is written as a function, with running statistics that some of them use."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("mean", torch.randn(WIDTH))
        self.register_buffer("var", torch.rand(WIDTH) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def written(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Written(function)


# name: (what makes the norm, the axis of the channels, whether it can shift them)
NORMS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "batch_norm": (lambda: nn.BatchNorm2d(WIDTH), 1, True),
    "batch_norm, plain": (lambda: nn.BatchNorm2d(WIDTH, affine=False), 1, True),
    "batch_norm function": (written(lambda x, m: F.batch_norm(x, m.mean, m.var, m.weight, m.bias)), 1, True),
    "batch_norm function, plain": (written(lambda x, m: F.batch_norm(x, m.mean, m.var)), 1, True),
    "batch_norm of torch": (
        written(lambda x, m: torch.batch_norm(x, m.weight, m.bias, m.mean, m.var, False, 0.1, 1e-5, False)),
        1,
        True,
    ),
    "group_norm": (lambda: nn.GroupNorm(2, WIDTH), 1, True),
    "group_norm function": (written(lambda x, m: F.group_norm(x, 2, m.weight, m.bias)), 1, True),
    "instance_norm": (lambda: nn.InstanceNorm2d(WIDTH), 1, True),
    "instance_norm function": (written(lambda x, m: F.instance_norm(x, weight=m.weight, bias=m.bias)), 1, True),
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), -1, True),
    "layer_norm, no bias": (lambda: nn.LayerNorm(WIDTH, bias=False), -1, True),
    "layer_norm function": (written(lambda x, m: F.layer_norm(x, (WIDTH,), m.weight, m.bias)), -1, True),
    "layer_norm function, plain": (written(lambda x, m: F.layer_norm(x, (WIDTH,))), -1, True),
    "rms_norm": (lambda: nn.RMSNorm(WIDTH), -1, False),
    "rms_norm function": (written(lambda x, m: F.rms_norm(x, (WIDTH,), m.weight)), -1, False),
}
every_norm = pytest.mark.parametrize("kind", NORMS)


def make(kind: str) -> Net:
    norm, axis, _ = NORMS[kind]
    stem = nn.Linear(3, WIDTH) if axis < 0 else nn.Conv2d(3, WIDTH, 3)

    def body(m: Net, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x).relu()).relu()  # the first ReLU keeps the stem from folding it
        return m.head(x.mean(1 if axis < 0 else (2, 3)))

    return Net(body, stem=stem, norm=norm(), head=nn.Linear(WIDTH, 5))


def inputs(kind: str) -> Tensor:
    shape = (24, 5, 3) if NORMS[kind][1] < 0 else (24, 3, 7, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def value_of_norm(values: dict[str, Any]) -> Tensor:
    (found,) = (value for name, value in values.items() if name.endswith("norm"))
    assert isinstance(found, Tensor)
    return found


@every_norm
def test_a_norm_is_the_line_of_least_squares(kind: str) -> None:
    _, axis, shifts = NORMS[kind]
    x = inputs(kind)
    models = pair(lambda: make(kind), x)
    prepared = fxzip.prepare(*models, example_inputs=x).observe([x[:10], x[10:]], hold_back=False, progress=False)
    (name,) = (n.name for n in prepared.alignment.modules[0].graph.nodes if n.name.endswith("norm"))
    zipped = prepared.convert(cut=name, method="zip", progress=False)
    (crossing,) = call(zipped.trunk, x)
    for parent, head in zip(prepared.alignment.modules, zipped.heads.values(), strict=True):
        value, goal = value_of_norm(recorded(head, crossing)), value_of_norm(recorded(parent, x))
        rest = (goal - value).movedim(axis, 0).flatten(1)
        assert float(rest.square().mean()) > 1e-4
        assert float((rest * value.movedim(axis, 0).flatten(1)).mean(1).abs().max()) < 1e-9
        assert float(rest.mean(1).abs().max()) < 1e-9 or not shifts


@every_norm
def test_what_is_exact_stays_exact(kind: str) -> None:
    x = inputs(kind)
    model = randomise(make(kind), x)
    other = permuted_copy(model, x)
    zipped = fxzip.zip(model, other, [x[:10], x[10:]], method="permute", hold_back=False, progress=False)
    for expected, out in zip((call(model, x), call(other, x)), call(zipped, x), strict=True):
        assert difference(expected, out) < 1e-4


@pytest.mark.parametrize("kind", ["batch_norm, plain", "instance_norm", "layer_norm, no bias", "rms_norm"])
def test_a_norm_that_was_given_parameters_can_be_saved(kind: str, tmp_path: Any) -> None:
    x = inputs(kind)
    zipped = fxzip.zip(*pair(lambda: make(kind), x), [x], method="zip", hold_back=False, progress=False)
    zipped.save(tmp_path / "merged")
    for expected, out in zip(call(zipped, x), call(fxzip.load(tmp_path / "merged"), x), strict=True):
        assert difference(expected, out) < 1e-9


def test_a_norm_that_others_use_is_left_as_it_is() -> None:
    def twice(m: Net, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x).relu())
        return m.head(m.norm(m.second(x).relu()).mean(1))

    x = inputs("layer_norm")
    layers = {"stem": nn.Linear(3, WIDTH), "second": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 5)}
    model = randomise(Net(twice, norm=nn.LayerNorm(WIDTH), **layers), x)
    zipped = fxzip.zip(model, permuted_copy(model, x), [x], method="permute", hold_back=False, progress=False)
    assert difference(call(model, x), call(zipped, x)[0]) < 1e-4


def test_a_line_is_fitted_to_each_channel() -> None:
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    t = 2 * x + torch.tensor([1.0, 2.0, 3.0])[:, None]
    for values, goals in (([x], [t]), (x.split(3), t.split(3))):
        slope, shift = scale_and_shift(list(values), list(goals), axis=1)
        assert torch.allclose(slope, torch.full((3,), 2.0, dtype=torch.float64))
        assert torch.allclose(shift, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    slope, shift = scale_and_shift([x], [t], axis=1, intercept=False)
    assert torch.allclose(slope, (x * t).sum((0, 2)) / x.square().sum((0, 2)))
    assert not shift.any()
    assert scale_and_shift([torch.ones(4, 1)], [torch.arange(4.0)[:, None]], axis=1)[0].tolist() == [1.0]
