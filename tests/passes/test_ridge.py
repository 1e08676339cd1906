"""The ridge that is found from images left out, and what layers are held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxzip
from fxzip.data.held import one_of
from fxzip.demo import DigitNet
from fxzip.passes.refit.regression import Residuals
from fxzip.passes.refit.ridge import FOLD, GRID, START, Trial
from tests.nets import pair
from tests.oracles import images

INPUTS, OUTPUTS, POSITIONS = 6, 4, 3


def drawn(images: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of inputs (1, d, n), and of residuals (1, o, n) that depend on them but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, INPUTS, images * POSITIONS, generator=generator, dtype=torch.float64) + 2
    weights = torch.randn(1, OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    residual = weights @ x + 1 + noise * torch.randn(1, OUTPUTS, x.shape[2], generator=generator, dtype=torch.float64)
    return x, residual


def trial(x: Tensor, residual: Tensor, batches: int = 2) -> Trial:
    found = Trial(intercept=True)
    images = x.shape[2] // POSITIONS
    for some in torch.arange(images).chunk(batches):
        here = slice(int(some[0]) * POSITIONS, int(some[-1] + 1) * POSITIONS)
        which = torch.arange(len(some)).repeat_interleave(POSITIONS)
        for left_out, mine in found.parts(which + int(some[0])):
            found.add(left_out, x[:, :, here][:, :, mine], residual[:, :, here][:, :, mine])
    return found


@pytest.mark.parametrize("start", [GRID[0], START, GRID[-1]])
def test_what_the_inputs_tell_is_fitted_and_noise_is_not(start: float) -> None:
    assert trial(*drawn(100, 0.01)).best(start) == GRID[0]
    x, residual = drawn(20, 0.0)
    noise = torch.randn(residual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert trial(x, noise).best(start) >= 1


def test_its_error_is_that_of_the_images_left_out() -> None:
    x, residual = drawn(30, 1.0)
    found = trial(x, residual)
    held = one_of(torch.arange(30), FOLD).repeat_interleave(POSITIONS)
    error = found._errors()
    for ridge in (1e-3, 1.0):
        own, sums = x[:, :, ~held], Residuals()
        r = residual[:, :, ~held]
        sums.add(own.shape[2], r @ own.mT, r.sum(2), own.sum(2))
        weights, bias = found.rest.step(sums, ridge)
        left = residual[:, :, held] - weights @ x[:, :, held] - bias[:, :, None]
        plain = residual[:, :, held] - r.mean(2, keepdim=True)  # what the bias alone leaves
        assert error(ridge) == pytest.approx(float(left.square().sum() - plain.square().sum()))


def test_both_parts_together_are_the_gram_matrix_of_all() -> None:
    x, residual = drawn(30, 1.0)
    gram = trial(x, residual).together().centred()
    centred = x - x.mean(2, keepdim=True)
    assert torch.allclose(gram, centred @ centred.mT)


def test_without_images_left_out_it_stays_where_it_was() -> None:
    assert trial(*drawn(3, 1.0), batches=1).best(0.1) == 0.1


def test_the_strongest_ridge_is_the_papers_rule_with_its_statistics_reset() -> None:
    """But for the bias, which is the shift that fits best."""
    x = images(12, 16, channels=1)
    models = pair(DigitNet, x)
    prepared = fxzip.prepare(*models, example_inputs=x[:2]).observe([x], hold_back=False, progress=False)
    paper = prepared.convert(method="zip", refit=False, progress=False).trunk
    strong = prepared.convert(method="zip", refit=fxzip.RefitOptions(ridge=1e9, rounds=0), progress=False).trunk
    norm = paper.bn1
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    wanted = paper.conv1.weight * scale[:, None, None, None]
    assert torch.allclose(strong.conv1.weight, wanted, rtol=1e-4, atol=1e-6)
