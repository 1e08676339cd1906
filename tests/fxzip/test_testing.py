"""The public oracles: a right analysis passes each of them, and each notices what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import OptionError
from fxzip.rules.registry import unregister_rule
from fxzip.testing import (
    TOLERANCE,
    difference,
    ensemble_error,
    images,
    mutations_missed,
    permutation_error,
    randomise,
    self_zip_errors,
)
from tests.nets import Net, Residual, chain, conv, untouched

X = images(6, 8)


class Two(nn.Module):
    """Two inputs; the outputs lie in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 3)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        x = F.relu(self.b(F.relu(self.a(image * mask))))
        return {"logits": self.head(x.mean((2, 3))), "more": [mask, None]}


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    """It says that a product over the channels so far is made element by element."""
    fxzip.register_rule(torch.Tensor.cumprod)(lambda ctx, x, dim: x)
    yield
    unregister_rule("cumprod")


def two_inputs() -> dict[str, Tensor]:
    return {"image": X, "mask": (X[:, :1] > 0).double()}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_nested_outputs_and_several_inputs_pass_all_oracles(kind: str) -> None:
    inputs = two_inputs() if kind == "dict" else tuple(two_inputs().values())
    model = randomise(Two(), inputs)
    assert permutation_error(model, inputs) < TOLERANCE
    assert mutations_missed(model, inputs) == []
    errors = self_zip_errors(model, inputs, methods=("permute", "zip"), step=2)
    assert len(errors) > 2
    assert max(errors.values()) < TOLERANCE
    assert ensemble_error(model, inputs) == 0.0


def test_a_wrong_rule_is_noticed(wrong_rule: None) -> None:
    def product(m: Net, x: Tensor) -> Tensor:
        return m.head(m.b(m.a(x).sigmoid().cumprod(1)).relu().mean((2, 3)))

    model = randomise(Net(product, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 3)), X)
    assert permutation_error(model, X) > 1e-3


def test_a_site_that_does_not_show_is_missed() -> None:
    torch.manual_seed(0)
    model = Net(chain, a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 8), head=nn.Linear(8, 3)).double().eval()
    missed = {site.parameter for site in mutations_missed(model, X)}
    assert missed == {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert mutations_missed(randomise(model, X), X) == []


def test_a_parameter_that_changes_nothing_is_not_missed() -> None:
    class Cancelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.none = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.a(x)) + self.none * (x[:, :1] - x[:, :1]))

    x = torch.randn(9, 5, dtype=torch.float64)
    model = randomise(Cancelled(), x)
    spec = fxzip.analyse(model, x)
    assert "none" in {site.parameter for space in spec.spaces for site in space.sites}
    assert mutations_missed(model, x, spec) == []


def test_folded_weights_can_be_mutated() -> None:
    from timm.layers import StdConv2d

    model = randomise(Net(chain, a=StdConv2d(3, 8, 3), b=StdConv2d(8, 8, 3), head=nn.Linear(8, 3)), X)
    spec = fxzip.analyse(model, X)
    assert spec.folded
    assert mutations_missed(model, X, spec) == []


def test_models_stay_as_they_are_and_are_computed_in_float64() -> None:
    model, x = Residual(), X.float()
    with untouched(model):
        assert model.training
        assert permutation_error(model, x) < TOLERANCE
        mutations_missed(model, x, most=2)
        assert self_zip_errors(model, x, cuts=(0.0,)) == {0.0: 0.0}
        assert randomise(model, x) is not model
    assert permutation_error(model, x, dtype=torch.float32) > 1e-9


def test_a_given_spec_is_what_is_tried() -> None:
    model = randomise(Residual(), X)
    spec = fxzip.analyse(model, X)
    first = spec.spaces[0]
    wrong = replace(spec, spaces=(replace(first, sites=first.sites[1:]), *spec.spaces[1:]))
    assert permutation_error(model, X, spec) < TOLERANCE
    assert permutation_error(model, X, wrong) > 1e-3
    assert self_zip_errors(model, X, wrong, cuts=(None,))[None] > 1e-3


def test_random_values_leave_nothing_at_its_start() -> None:
    model = randomise(Residual(), X, seed=3)
    fresh = Residual().double()
    for (name, new), old in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if new.dim() == 1:
            assert len(new.unique()) == len(new), name
        assert not torch.equal(new, old), name
    assert all(bool((norm.running_mean != 0).all()) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    again = randomise(Residual(), X, seed=3)
    assert not torch.equal(model.fc.bias, randomise(model, X, seed=4).fc.bias)
    assert model.norm.weight.tolist() == again.norm.weight.tolist()


def test_difference() -> None:
    a = torch.tensor([1.0, -1.0])
    assert difference(a, a + 0.5) == 0.5
    assert difference({"x": [a, None]}, {"x": [a.clone(), None]}) == 0
    assert difference(torch.tensor([torch.inf, 0.0]), torch.tensor([torch.inf, 0.0])) == 0
    assert difference(a, torch.tensor([1.0, torch.nan])) == torch.inf
    assert difference(torch.tensor([4.0]), torch.tensor([5.0])) == 0.25  # of one number the scale is itself
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) == 2
    with pytest.raises(OptionError, match=r"shapes \(2,\) and \(1,\)"):
        difference(a, a[:1])
    with pytest.raises(OptionError, match="0 and 1 tensors"):
        difference(None, a)
