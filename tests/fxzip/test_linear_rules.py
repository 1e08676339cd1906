"""A user's own layer, taught by one rule: it is analysed, merged, folded at the cut, refitted and recalibrated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.labelling.labels import Labelled
from fxzip.passes.recalibrate import recalibrate
from fxzip.passes.trace import trace
from fxzip.passes.trace.clean import clean
from fxzip.rules import Norm, RuleContext, product
from fxzip.rules.contractions import matmul
from fxzip.rules.registry import unregister_rule
from tests.nets import Net, conv, pair, permuted_copy
from tests.oracles import TOLERANCE, call, difference, images, permutation_error, randomise


@torch.library.custom_op("tests::my_linear", mutates_args=())
def my_linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bi,io->bo", x, w)


@my_linear.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient @ ctx.saved_tensors[0].mT, None


my_linear.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]))


@torch.library.custom_op("tests::my_norm", mutates_args=())
def my_norm(input: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    return (input - running_mean) / (running_var + eps).sqrt()


@my_norm.register_fake
def _(input: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    return torch.empty_like(input)


OWN = torch.ops.tests.my_linear.default
NORM = torch.ops.tests.my_norm.default


class Mine(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return my_linear(x, self.kernel)


class MyNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.randn(width))
        self.register_buffer("spread", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return my_norm(x, self.centre, self.spread, 1e-5)


@pytest.fixture
def taught() -> Iterator[None]:
    """The rules, which are forgotten afterwards."""

    @fxzip.register_rule(OWN, kind="layer", linear=product("x", "w", "i,io->o"))
    def mine(ctx: Any, x: Any, w: Any) -> Any:
        return matmul(ctx, x, w)

    @fxzip.register_rule(NORM, norm=lambda given: Norm(1, statistics=True))
    def norm(ctx: Any, input: Any, running_mean: Any, running_var: Any, eps: Any) -> Any:
        laid = [ctx.per_channel(value, 1, like=input) for value in (running_mean, running_var)]
        ctx.statistic(running_mean, "mean")
        ctx.statistic(running_var, "variance")
        return ctx.elementwise(input, *laid)

    yield
    unregister_rule(OWN)
    unregister_rule(NORM)


def make(norm: bool = False) -> Net:
    def body(m: Net, x: Tensor) -> Tensor:
        x = m.first(x).tanh()
        x = m.norm(m.second(x)) if norm else m.second(x)
        return m.head(x.relu())

    layers = {"first": nn.Linear(5, 12), "second": Mine(12, 10), "head": Mine(10, 4)}
    return Net(body, **layers, **({"norm": MyNorm(10)} if norm else {}))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_own_layers_are_analysed(x: Tensor, taught: None) -> None:
    model = randomise(make(), x)
    spec = fxzip.analyse(model, x)
    assert [space.size for space in spec.spaces] == [12, 10]
    assert not spec.probed
    assert permutation_error(model, x, spec) < 1e-9


def test_a_merge_with_itself_is_exact_at_every_cut_and_needs_no_gather(x: Tensor, taught: None) -> None:
    model = randomise(make(), x)
    prepared = fxzip.prepare(model, permuted_copy(model, x), example_inputs=x).observe([x], progress=False)
    expected = call(model, x)
    for cut in prepared.cuts:
        for refit in (False, True):
            zipped = prepared.convert(cut=cut, method="permute", refit=refit, progress=False)
            assert max(difference(expected, out) for out in call(zipped, x)) < (1e-4 if refit else 1e-9)
            for head in zipped.heads.values():
                assert not any(node.name.startswith("unmerge") for node in head.graph.nodes), cut


def test_refit_solves_for_own_layers(x: Tensor, taught: None) -> None:
    models = pair(make, x)
    prepared = fxzip.prepare(*models, example_inputs=x).observe([x], progress=False)
    wanted = [call(model, x) for model in models]

    def error(refit: bool) -> float:
        zipped = prepared.convert(refit=refit, progress=False)
        assert not refit or zipped.report.refitted == 4
        return sum(float((a - b).square().mean()) for a, b in zip(wanted, call(zipped, x), strict=True))

    assert error(refit=True) < 0.5 * error(refit=False)


def test_own_statistics_are_merged_folded_and_reset(x: Tensor, taught: None) -> None:
    model = randomise(make(norm=True), x)
    spec = fxzip.analyse(model, x)
    kinds = {site.parameter: site.statistic for space in spec.spaces for site in space.sites}
    assert (kinds["norm.centre"], kinds["norm.spread"], kinds["second.kernel"]) == ("mean", "variance", None)
    module = trace(model, (x,))
    assert recalibrate(module, [x], progress=False) == 1
    before = my_linear(model.first(x).tanh(), model.second.kernel).detach()
    torch.testing.assert_close(module.get_buffer("norm.centre"), before.mean(0))
    torch.testing.assert_close(module.get_buffer("norm.spread"), before.var(0))
    zipped = fxzip.zip(model, permuted_copy(model, x), [x], method="permute", progress=False)
    assert NORM not in {node.target for node in zipped.trunk.graph.nodes}  # folded into the layer before it
    assert max(difference(call(model, x), out) for out in call(zipped, x)) < 1e-4


KERNELS = {
    "linear": ((6, 8), lambda x, w: F.linear(x, w)),
    "matmul": ((8, 6), lambda x, w: x @ w),
    "einsum": ((6, 8), lambda x, w: torch.einsum("bti,oi->bto", x, w)),
    "conv": ((6, 8, 3), lambda x, w: F.conv1d(x.mT, w).mT),
    "conv_transpose": ((8, 6, 3), lambda x, w: F.conv_transpose1d(x.mT, w).mT),
}


class Written(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        shape, self.function = KERNELS[kind]
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("kind", KERNELS)
def test_layers_that_are_functions_are_folded_at_the_cut(kind: str) -> None:
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = randomise(Net(lambda m, x: m.layer(m.stem(x).relu()), stem=nn.Linear(3, 8), layer=Written(kind)), x)
    prepared = fxzip.prepare(model, permuted_copy(model, x), example_inputs=x).observe([x], progress=False)
    zipped = prepared.convert(method="permute", refit=False, progress=False)
    assert max(difference(call(model, x), out) for out in call(zipped, x)) < 1e-9
    assert not any(n.name.startswith("unmerge") for head in zipped.heads.values() for n in head.graph.nodes)


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (lambda x: F.dropout(x, training=False), True),
        (lambda x: F.dropout(x), False),
        (lambda x: F.alpha_dropout(x), True),
        (lambda x: F.feature_alpha_dropout(x, 0.5, True), False),
        (lambda x: F.dropout2d(x, 0.0), True),
        (lambda x: torch.dropout(x, 0.5, False), True),
        (lambda x: torch.ops.aten.dropout.default(x, 0.5, True), False),
    ],
)
def test_dropouts_go_where_they_drop_nothing(function: Any, gone: bool) -> None:
    module = torch.fx.symbolic_trace(Net(lambda m, x: function(x) + 1))
    assert ("dropout" in clean(module, lambda _: {}).code) is not gone


def test_a_rule_for_a_module_class_of_ones_own_is_used() -> None:
    """Such a module is a node of the graph; without its rule it would be looked into."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale[:, None, None] * 2

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.b(m.own(F.relu(m.a(x))))).mean((2, 3)))

    def rule(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
        seen.append(ctx.name)
        return ctx.elementwise(x, ctx.per_channel("scale", axis=1, like=x))

    seen: list[str] = []
    x = images(4, 6)
    net = randomise(Net(forward, a=conv(3, 8), own=Doubled(), b=conv(8, 6), head=nn.Linear(6, 3)), x)
    fxzip.register_rule(Doubled)(rule)
    try:
        assert permutation_error(net, x) < TOLERANCE
        assert seen == ["own"]
    finally:
        unregister_rule(Doubled)
