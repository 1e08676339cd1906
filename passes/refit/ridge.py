"""The ridge of a unit, chosen by images that its fit leaves out.

Samples of one image (the positions of a feature map) are not independent, so whole images are held back: one of
`FOLD`. For each λ of a grid the step that the other images ask for is tried on them. The sums of both parts are
kept apart and give the Gram matrix of all together, so this costs a factorisation for each λ that is tried and no
pass over the images. The grid is walked downhill from where the unit before ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from fxzip.data.held import one_of
from fxzip.passes.refit.regression import Regression, Residuals
from fxzip.passes.refit.systems import PRECISE
from fxzip.processes import Processes, Total, exact

GRID = tuple(10.0**power for power in range(-4, 3))
"""The λs that are tried, as shares of the inputs' mean square."""
START = 0.1
"""Where the first unit's walk begins."""
FOLD = 5
"""One image of so many is held back."""
OUTPUTS = 64
"""A λ is tried on about this many of a unit's outputs."""


class Spread:
    """The sums of squares of values about their means, output by output."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add values (groups, o, samples)."""
        if self._shift is None:
            self._shift = values.mean(2, keepdim=True)
        moved = values - self._shift
        self.count += values.shape[2]
        self._sum = self._sum + moved.sum(2, dtype=torch.float64)
        self._square = self._square + moved.square().sum(2, dtype=torch.float64)

    def over_all(self, total: Total) -> Spread:
        """That of the values of all processes."""
        found, own = Spread(), None
        if self._shift is not None:
            own = [exact(self.count), self._sum + self.count * self._shift[:, :, 0].double()]
        count, sums = total("errors", own)
        place = sums / count.to(sums)
        if self._shift is not None:
            gap = self._shift[:, :, 0].double() - place
            own = [self._square + 2 * gap * self._sum + self.count * gap.square()]
        (found._square,) = total("errors", own)
        found.count, found._shift, found._sum = round(float(count)), place[:, :, None], torch.zeros_like(place)
        return found

    @property
    def each(self) -> Tensor:
        """Those of each output (groups, o), float64."""
        return (self._square - self._sum.square() / max(self.count, 1)).clamp_min(0)

    @property
    def total(self) -> float:
        """The sum over all outputs."""
        return float(self.each.sum())


class Trial:
    """The samples of a unit's inputs and of its residuals at W₀, those of some images apart.

    Args:
        intercept: As of `Regression`.
        leave_out: Whether to keep some images apart: a ridge that is given needs none.

    Attributes:
        rest: The Gram matrix of the images that a step is found from.
        held: The Gram matrix of those that it is tried on.
        error: The residuals at W₀ of all samples, also of those that are not added: their spread is what a bias does
            not make up for.
    """

    def __init__(self, intercept: bool, leave_out: bool = True) -> None:
        self.rest = Regression(intercept)
        self.held = self.rest.beside()
        self._rest, self._held = Residuals(), Residuals()
        self._leave_out = leave_out
        self.error = Spread()

    def parts(self, image: Tensor) -> Iterator[tuple[bool, Tensor]]:
        """Which samples of a batch to `add`, and whether as those left out.

        Args:
            image: The image that each sample is of (samples,), counted through all batches.
        """
        held = one_of(image, FOLD) if self._leave_out else torch.zeros_like(image, dtype=torch.bool)
        for left_out, mine in ((False, ~held), (True, held)):
            if bool(mine.any()):
                yield left_out, mine.nonzero()[:, 0]

    def add(self, left_out: bool, x: Tensor, residual: Tensor) -> None:
        """Add samples of the inputs (groups, d, samples) and of the outputs' residuals (groups, o, samples)."""
        if not (self.rest.count or self.held.count):
            self.rest.shift_by(x)
            self.held = self.rest.beside()
        part, sums = (self.held, self._held) if left_out else (self.rest, self._rest)
        part.add(x)
        sums.add(x.shape[2], (residual @ x.mT).double(), residual.sum(2).double(), x.sum(2).double())

    def over_all(self, processes: Processes, device: torch.device | None, dtype: torch.dtype) -> Trial:
        """The samples of all processes; ``dtype`` is that of the data, also where a process has none."""
        total = partial(processes.total, device=device)
        found = Trial(self.rest.intercept, self._leave_out)
        own = [part for part in (self.rest, self.held) if part.count]
        sums = [exact(part.count) for part in own], [part.mean * part.count for part in own]
        count, mean = total("means", [torch.stack(each).sum(0) for each in sums] if own else None)
        place = (mean / count.to(mean)).to(dtype)
        found.rest, found.held = (part.over_all(place, processes) for part in (self.rest, self.held))
        found._rest, found._held = self._rest.over_all(total), self._held.over_all(total)
        found.error = self.error.over_all(total)
        return found

    @property
    def residuals(self) -> Residuals:
        """Those of all images."""
        return self._rest.plus(self._held)

    def together(self) -> Regression:
        """The Gram matrix of all images."""
        return self.rest.plus(self.held)

    def best(self, start: float) -> float:
        """The λ of the grid with the least error on the images held back, found downhill from ``start``."""
        if not (self.rest.count and self.held.count):
            return start
        error = cache(self._errors())
        place = min(range(len(GRID)), key=lambda i: abs(math.log(GRID[i] / start)))
        while place + 1 < len(GRID) and error(GRID[place + 1]) < error(GRID[place]):
            place += 1
        while place and error(GRID[place - 1]) < error(GRID[place]):
            place -= 1
        return GRID[place]

    def _errors(self) -> Callable[[float], float]:
        """What tells the sum of squares on the images held back for a λ, less that of the residuals as they are.

        All is taken about the means of the other images, which the bias makes up for.
        """
        rest, held, mean = self._rest, self._held, self.rest.mean
        left = rest.residual / rest.count if self.rest.intercept else torch.zeros_like(rest.residual)
        some = slice(None, None, -(-left.shape[1] // OUTPUTS))
        products, tried_on = (
            (
                sums.products
                - sums.residual[:, :, None] * mean[:, None, :]
                - left[:, :, None] * (sums.inputs - sums.count * mean)[:, None, :]
            )[:, some]
            for sums in (rest, held)
        )

        def error(ridge: float) -> float:
            try:
                weights = self.rest.system(ridge, rough=products.shape[2] > PRECISE).solve(products)
            except ArithmeticError:
                return math.inf
            return float(self.held.made_by(weights, mean).sum() - 2 * (tried_on * weights).sum())

        return error
