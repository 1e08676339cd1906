"""Networks that draw random numbers in eval mode: they are named, and merged all the same."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzip
from fxzip.errors import TraceError
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier
from tests.nets import Net, conv
from tests.oracles import TOLERANCE, images, randomise

X = images(8, 6)
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dropout": (lambda y: F.dropout(y, 0.2), "dropout"),
    "training by place": (lambda y: F.dropout2d(y, 0.2, True), "dropout2d"),
    "training by name": (lambda y: F.alpha_dropout(input=y, p=0.2, training=True), "alpha_dropout"),
    "torch's dropout": (lambda y: torch.dropout(y, 0.2, True), "dropout"),
    "noise": (lambda y: y + 0.1 * torch.randn_like(y), "randn_like"),
    "drop path": (lambda y: y * (torch.rand(y.shape[0], 1, 1, 1) > 0.2), "rand"),
    "masked": (lambda y: y * torch.full_like(y, 0.5).bernoulli(), "bernoulli"),
    "shuffled samples": (lambda y: y[torch.randperm(y.shape[0])], "randperm"),
    "an operator": (lambda y: torch.ops.aten.bernoulli.p(y, 0.5) * y, "bernoulli"),
    "filled": (lambda y: y * torch.empty(y.shape[0], 1, 1, 1, dtype=y.dtype).uniform_(0.5, 1), "uniform"),
    "attention": (lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.1), "scaled_dot_product_attention"),
}


def network(function: Callable[[Tensor], Tensor], seed: int = 0) -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = function(F.relu(m.a(x)))
        return m.head(F.relu(m.b(y)).mean((2, 3)))

    torch.manual_seed(seed)
    return randomise(Net(forward, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 3)), X, seed)


@pytest.mark.parametrize("name", DRAWS)
def test_what_draws_is_named_and_checked_without_it(name: str) -> None:
    function, drawn = DRAWS[name]
    with pytest.warns(UserWarning, match=rf"draws random numbers in eval mode.*\({drawn}\)"):
        prepared = fxzip.prepare(network(function), network(function, 1), example_inputs=X)
    assert prepared.verified is not None
    assert prepared.verified.permutation < TOLERANCE
    assert len(prepared.spec.spaces) == 2  # none is blamed for what chance does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipped = prepared.observe([X], progress=False).convert(progress=False)
    assert zipped.report.verified.merge < TOLERANCE
    assert zipped.report.verified.ensemble < 1e-4


def test_a_fault_beside_chance_is_found_all_the_same() -> None:
    with pytest.warns(UserWarning, match="draws"):
        graph = trace(network(DRAWS["dropout"][0]), (X,))
    spec = fxzip.analyse(graph, X)
    verifier = Verifier(graph, ((X,), {}))
    assert verifier.permutation_error(spec) < TOLERANCE
    first, *others = spec.spaces
    assert verifier.permutation_error(replace(spec, spaces=(replace(first, sites=first.sites[:-1]), *others))) > 0.01
    assert [node.target for node in graph.graph.nodes if node.name == "dropout"] == [F.dropout]  # in the user's graph


@pytest.mark.parametrize(
    "function",
    [lambda y: F.dropout(y, 0.5, False), lambda y: nn.Dropout(0.5).eval()(y), lambda y: F.rrelu(y), lambda y: y],
)
def test_what_draws_in_training_only_is_not_named(function: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(network(function), (X,))


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()).item())])
def test_numbers_of_python_s_own_are_refused(draw: Callable[[], Any]) -> None:
    """They would be constants of the graph."""
    with pytest.raises(TraceError):
        trace(network(lambda y: y * draw()), (X,))
