"""Probing: what is found by trying an operation that has no rule, and what is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.trace import trace
from fxzip.rules import find_rule
from tests.oracles import TOLERANCE, images, mutations_missed, permutation_error, randomise

X = images(4, 8)


class Between(nn.Module):
    """A function, or a module, between two layers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], extra: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.extra, self.c, self.head = extra, nn.LazyConv2d(6, 1), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.a(x), self.b(x))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


def built(function: Callable[..., Tensor], extra: nn.Module | None = None) -> nn.Module:
    model = Between(lambda a, b: function(a, b) if extra is None else function(model.extra, a, b), extra).double()
    with torch.no_grad():
        model(X)
    return randomise(model, X)


KNOWN: dict[str, tuple[Callable[..., Tensor], nn.Module | None, str]] = {
    "along": (lambda a, b: a.cumsum(2), None, "cumsum (cumsum): axis 1 of the input comes out on axis 1"),
    "two that meet": (lambda a, b: torch.hypot(a, b), None, "axis 1 of argument 0 with axis 1 of argument 1 comes out"),
    "moved": (lambda a, b: torch.fft.ifftshift(a, dim=(2, 3)).cummax(3)[0], None, "cummax (cummax): axis 1"),
    "ends": (lambda a, b: a + torch.median(b, 1, keepdim=True)[0], None, "median (median): axis 1 of the input ends"),
    "sorted": (lambda a, b: a * torch.sort(b, 2)[0], None, "sort (sort): axis 1 of the input comes out on axis 1"),
    "a module of two": (
        lambda m, a, b: a * m(a, b)[:, None], nn.CosineSimilarity(1),
        "axis 1 of argument 0 with axis 1 of argument 1 ends",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_what_trying_finds(name: str) -> None:
    function, extra, sentence = KNOWN[name]
    model = built(function, extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.FrozenSpaceWarning)
        spec = fxzip.analyse(model, X)
    assert any(sentence in found for found in spec.probed), spec.probed
    assert sentence.partition(":")[0] in str(spec)
    assert spec.coverage > 0.9
    assert permutation_error(model, X, spec) < TOLERANCE
    assert mutations_missed(model, X, spec, most=100) == []


def scattered(a: Tensor, b: Tensor) -> Tensor:
    return torch.diff(a, dim=1, append=b[:, :1])


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "order matters": lambda a, b: a.cumsum(1),
    "neighbours": scattered,
    "chance": lambda a, b: a + torch.normal(a * 0, 1.0) * 0,
    "a position that is used": lambda a, b: a + b.median(1, keepdim=True)[1],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_trying_does_not_explain_is_kept_in_place(name: str) -> None:
    model = built(UNKNOWN[name])
    with pytest.warns(fxzip.FrozenSpaceWarning, match="kept in place at"):
        spec = fxzip.analyse(model, X)
    assert "c" in {space.name for space in spec.spaces}
    assert spec.frozen
    assert permutation_error(model, X, spec) < TOLERANCE


def test_the_axes_of_parameters_are_found_too() -> None:
    """A bilinear layer: each input meets its own axis of the weight, and the outputs come from the third."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.pair = nn.Linear(5, 8), nn.Linear(5, 7), nn.Bilinear(8, 7, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.pair(self.a(x).tanh(), self.b(x).tanh())))

    x = torch.randn(16, 5, dtype=torch.float64)
    model = randomise(Pairs(), x)
    assert find_rule(model.pair) is None
    spec = fxzip.analyse(model, x)
    assert {space.name: space.size for space in spec.spaces} == {"a": 8, "b": 7, "pair": 6}
    roles = {(site.parameter, site.axis): site.role for space in spec.spaces for site in space.sites}
    assert [roles["pair.weight", axis] for axis in range(3)] == ["produce", "contract", "contract"]
    assert roles["pair.bias", 0] == "produce"
    assert permutation_error(model, x, spec) < TOLERANCE
    assert mutations_missed(model, x, spec, most=100) == []


def test_probing_changes_nothing_of_the_model() -> None:
    model = built(lambda a, b: a.cumsum(2))
    traced = trace(model, (X,))
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    state = torch.get_rng_state()
    fxzip.analyse(traced, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in traced.state_dict().items())
