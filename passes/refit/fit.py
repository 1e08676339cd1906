"""`Fit`: the solution of a unit while it is sought."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxzip.passes.refit.regression import Regression
from fxzip.passes.refit.ridge import START
from fxzip.passes.refit.units import Unit


@dataclass(eq=False)
class Fit:
    """A unit's solution, and what it takes to better it.

    Attributes:
        unit: The unit.
        inputs: Their Gram matrix, of some samples.
        prior: W₀, (groups, o, d).
        sizes: How many of the d inputs each layer has.
        weights: (groups, o, d).
        bias: (groups, o).
        told: The outputs that depend on the inputs, bool (groups, o); None until that was determined.
        ridge: λ as a share of the mean of the inputs' sums of squares.
    """

    unit: Unit
    inputs: Regression
    prior: Tensor
    sizes: list[int]
    weights: Tensor
    bias: Tensor
    told: Tensor | None = None
    ridge: float = START
