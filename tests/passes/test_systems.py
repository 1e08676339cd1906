"""Systems of ridge regression, solved with the inputs' products or with the samples'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxzip.passes.refit.regression import FEW, Regression, Residuals
from fxzip.passes.refit.systems import OfInputs, OfSamples

GROUPS, INPUTS, OUTPUTS = 2, 24, 5


def drawn(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (groups, d, samples) that are correlated and off 0, and residuals (groups, o, samples)."""
    generator = torch.Generator().manual_seed(samples)
    mix = torch.randn(GROUPS, INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(GROUPS, INPUTS, samples, generator=generator, dtype=torch.float64) + 3
    return x.to(dtype), torch.randn(GROUPS, OUTPUTS, samples, generator=generator, dtype=torch.float64).to(dtype)


def solved(x: Tensor, residual: Tensor, ridge: float, folded: bool) -> tuple[Tensor, Tensor]:
    """A step from samples that came in two batches."""
    regression, residuals = Regression(), Residuals()
    for part in (slice(0, 3), slice(3, None)):
        here, left = x[:, :, part], residual[:, :, part]
        regression.add(here)
        residuals.add(here.shape[2], (left @ here.mT).double(), left.sum(2).double(), here.sum(2).double())
    if folded:
        regression.centred()  # takes the products, so that no samples are left
    assert isinstance(regression.system(ridge), OfInputs if folded else OfSamples)
    return regression.step(residuals, ridge, back=torch.ones(GROUPS, OUTPUTS, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("samples", [4, int(FEW * INPUTS)])
def test_both_ways_give_the_same_solution(samples: int, ridge: float) -> None:
    few, many = (solved(*drawn(samples), ridge, folded) for folded in (False, True))
    for mine, other in zip(few, many, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_few_samples_of_single_precision_are_solved_as_well() -> None:
    few, exact = solved(*drawn(8, torch.float32), 1e-3, False), solved(*drawn(8), 1e-3, True)
    torch.testing.assert_close(few[0], exact[0], rtol=1e-3, atol=1e-3)


def test_parts_of_few_samples_together() -> None:
    x, _ = drawn(10)
    rest, whole = Regression(), Regression()
    rest.add(x[:, :, :6])
    other = rest.beside()
    other.add(x[:, :, 6:])
    whole.add(x)
    both, place = rest.plus(other), x.mean(2) + 1
    weights = torch.randn(GROUPS, OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = (weights @ (x - place[:, :, None])).square().sum(2)
    assert both.count == 10
    torch.testing.assert_close(both.made_by(weights, place), made)
    whole.centred()
    torch.testing.assert_close(whole.made_by(weights, place), made)
    torch.testing.assert_close(both.centred(), whole.centred())


def test_inputs_that_are_not_finite_are_refused() -> None:
    x, residual = drawn(8)
    x[0, 0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="not finite"):
        solved(x, residual, 1e-3, False)
