"""The sums that fitting takes over a batch, and the steps that follow from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxzip.passes.refit.lockstep import Batch
from fxzip.passes.refit.regression import Residuals
from fxzip.passes.refit.units import Unit

GRAM_SAMPLES, GRAM_LEAST = 28, 2**15
"""Samples in a Gram matrix: this many for each input, and no fewer than the second in all. It may be approximate, as
residuals are taken over all samples."""
DAMPING = 0.1
"""What is added to the curvature, as a share of its mean eigenvalue."""


def width(unit: Unit) -> int:
    """How many inputs a unit has, in each group."""
    return sum(math.prod(layer.contraction.split[a] for a in layer.contraction.inputs) for layer in unit.layers)


def gram_samples(unit: Unit) -> int:
    """How many samples a unit's Gram matrix is taken of, if there are as many."""
    return max(GRAM_LEAST, GRAM_SAMPLES * width(unit))


def pulled_back(has: Tensor, value: Tensor, by: Tensor) -> Tensor | None:
    """Jᵀ ``by``, with J of ``has`` by ``value``; None where it does not depend on it smoothly, or nobody says how."""
    if not has.requires_grad:
        return None
    try:
        return torch.autograd.grad(has, value, by, retain_graph=True, allow_unused=True)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operator without a backward: a custom one, or one of integers
        return None


def curved(step: tuple[Tensor, Tensor], curvature: Tensor, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """A step of weights (groups, o, d) and bias (groups, o), by the inverse of a curvature (groups, o, o).

    ``least`` bounds from below what is added to the curvature: where gates are saturated, there is next
    to no curvature, and steps by its inverse would be of any length.
    """
    mean = curvature.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = curvature + ((DAMPING * mean).clamp(min=least) + 1e-30) * torch.eye(curvature.shape[1]).to(curvature)
    both = torch.linalg.solve(damped, torch.cat([step[0], step[1][:, :, None]], 2))
    return both[:, :, :-1], both[:, :, -1]


def power(tensor: Tensor) -> Tensor:
    """The sum of squares, a float64 scalar."""
    return precise(tensor).flatten().square().sum(dtype=torch.float64)


def add_residuals(residuals: Residuals, unit: Unit, batch: Batch, residual: Tensor) -> None:
    """Add the residual of a unit's value on a batch."""
    residual, first = precise(residual), unit.layers[0].contraction
    inputs = [(layer.contraction, precise(batch.env[-1][layer.source.name])) for layer in unit.layers]
    products = torch.cat([contraction.products(x, residual) for contraction, x in inputs], 2)
    totals = torch.cat([contraction.total_input(x) for contraction, x in inputs], 1)
    total = first.total_output(residual).double()
    residuals.add(first.samples(residual), products.double(), total, totals.double())


def columns(unit: Unit, batch: Batch, here: Tensor | None) -> Tensor:
    """The inputs of a unit's layers (groups, d, samples)."""
    parts = [layer.contraction.columns(batch.env[-1][layer.source.name], here) for layer in unit.layers]
    return precise(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def precise(tensor: Tensor) -> Tensor:
    """Sums of products want float32 at the least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
