"""Fitting: one-sided targets before a ReLU, and units in a row that are solved for what the last one gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.refit import RefitOptions
from fxzip.passes.refit.pairs import find_pairs
from fxzip.passes.refit.units import find_units
from fxzip.passes.trace import trace
from tests.nets import Net, Residual, conv, pair
from tests.oracles import call, images, recorded

X = images(32, 12)


def pairs_of(model: nn.Module, x: Tensor) -> set[tuple[str, str]]:
    module = canonicalise(trace(model, (x,)))
    return {
        (found.inner.layers[0].weight, found.outer.layers[0].weight) for found in find_pairs(module, find_units(module))
    }


def mlp(m: Net, x: Tensor) -> Tensor:
    x = m.embed(x).flatten(2).mT
    x = x + m.down(F.gelu(m.up(m.norm(x))))
    return m.head(x.mean(1))


def attention(m: Net, x: Tensor) -> Tensor:
    x = m.embed(x).flatten(2).mT
    q, k, v = m.qkv(m.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    x = x + m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return m.head(x.mean(1))


def test_an_inner_unit_is_one_whose_value_goes_to_one_other_unit() -> None:
    found = pairs_of(Residual(), X.float()[:2])
    inside = {(inner, outer) for inner, outer in found if inner.rpartition(".")[0].endswith("conv1")}
    assert inside, found
    assert all(inner.replace("conv1", "conv2") == outer for inner, outer in inside)
    assert not [inner for inner, _ in found if "conv2" in inner and "fc" not in dict(found)[inner]]  # the stream

    embed, norm, head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)
    net = Net(mlp, embed=embed, norm=norm, up=nn.Linear(8, 16), down=nn.Linear(16, 8), head=head)
    assert ("up.weight", "down.weight") in pairs_of(net, X.float()[:2])
    assert not [outer for inner, outer in pairs_of(net, X.float()[:2]) if inner == "embed.weight"]
    net = Net(attention, embed=embed, norm=norm, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=head)
    assert ("qkv.weight", "proj.weight") in pairs_of(net, X.float()[:2])


def rectified(m: Net, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x).relu()).relu().mean((2, 3)))


def test_before_a_relu_only_errors_that_come_through_count() -> None:
    def make() -> Net:
        return Net(rectified, a=conv(3, 6), b=conv(6, 8), head=nn.Linear(8, 4))

    models = pair(make, X)
    for model in models:
        model.b.bias.data -= recorded(fx.symbolic_trace(model), X)["b"].std((0, 2, 3))  # so that most is below 0
    prepared = fxzip.prepare(*models, example_inputs=X[:2]).observe([X], hold_back=False, progress=False)
    wanted = sum(recorded(module, X)["relu_1"] for module in prepared.alignment.modules) / 2

    def error(times: int) -> float:
        trunk = prepared.convert(method="average", refit=RefitOptions(rounds=0, steps=times), progress=False).trunk
        return float((recorded(trunk, X)["relu_1"] - wanted).square().mean())

    linear, twice = error(0), error(2)
    assert twice < 0.98 * linear


LAYERS = {mlp: {"up": (8, 16), "down": (16, 8)}, attention: {"qkv": (8, 24), "proj": (8, 8)}}


@pytest.mark.parametrize("kind", LAYERS)
def test_units_in_a_row_are_solved_for_what_the_last_one_gives(kind: Callable[[Net, Tensor], Tensor]) -> None:
    def make() -> nn.Module:
        parts = {name: nn.Linear(*sizes) for name, sizes in LAYERS[kind].items()}
        return Net(kind, embed=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), head=nn.Linear(8, 3), **parts)

    prepared = fxzip.prepare(*pair(make, X), example_inputs=X[:2]).observe([X], hold_back=False, progress=False)
    wanted = sum(recorded(module, X)["add"] for module in prepared.alignment.modules) / 2

    def error(rounds: int) -> float:
        trunk = prepared.convert(method="average", refit=RefitOptions(rounds=rounds), progress=False).trunk
        return float((recorded(trunk, X)["add"] - wanted).square().mean())

    assert error(3) < 0.98 * error(0)


def test_residual_branches_are_solved_for_what_they_give() -> None:
    models = pair(Residual, X)
    prepared = fxzip.prepare(*models, example_inputs=X[:2]).observe([X], hold_back=False, progress=False)
    expected = torch.cat([call(model, X) for model in models], 1)

    def error(rounds: int) -> float:
        zipped = prepared.convert(method="average", refit=RefitOptions(rounds=rounds), progress=False)
        return float((torch.cat(call(zipped, X), 1) - expected).square().mean())

    assert error(3) < 0.97 * error(0)


def sorted_out(m: Net, x: Tensor) -> Tensor:
    x = m.a(x).mean((2, 3))
    return m.head(m.b(x.sign()).relu())


def test_where_no_gradient_comes_through_each_layer_is_solved_once() -> None:
    models = pair(lambda: Net(sorted_out, a=conv(3, 6), b=nn.Linear(6, 8), head=nn.Linear(8, 4)), X)
    zipped = fxzip.zip(*models, [X], cut="head", method="zip", hold_back=False, progress=False)
    assert zipped.report.refitted == 4
    assert all(bool(output.isfinite().all()) for output in call(zipped, X))


def test_what_is_exact_stays_exact() -> None:
    model = pair(Residual, X)[0]
    zipped = fxzip.zip(model, model, [X], method="zip", hold_back=False, progress=False)
    for output in call(zipped, X):
        assert (output - call(model, X)).abs().max() < 1e-4
