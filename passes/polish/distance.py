"""How far an output is from what its parent gives: the error that polishing makes smaller, with what its steps need.

It is the unexplained share ‖y - ŷ‖² / ‖y - mean y‖² (`fxzip.fidelity.Answer`), and where an output holds classes, the
Kullback-Leibler divergence of the head's probabilities from the parent's, as a share of that of the mean
probabilities: of a language model's words squares lose the few that are likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Distance:
    """The distance of one output.

    Attributes:
        scale: What the sum of squares, or of divergences, is multiplied by.
        classes: The axis of the classes; None where there are none, and squares count.
    """

    scale: float
    classes: int | None = None

    def error(self, wanted: Tensor, has: Tensor) -> float:
        """The sum over a part of the images."""
        if self.classes is None:
            return self.scale * float((has.detach() - wanted).double().square().sum())
        target, given = (x.detach().double().log_softmax(self.classes) for x in (wanted, has))
        return self.scale * float((target.exp() * (target - given)).sum())

    def gradient(self, wanted: Tensor, has: Tensor) -> Tensor:
        """That of the error by the output."""
        if self.classes is None:
            return 2 * self.scale * (has.detach() - wanted)
        given, target = (x.detach().softmax(self.classes) for x in (has, wanted))
        return self.scale * (given - target)

    def probe(self, has: Tensor, generator: Generator) -> Tensor:
        """A random vector whose mean square is the error's curvature in the output."""
        if self.classes is None:
            signs = torch.randint(2, has.shape, generator=generator).to(has) * 2 - 1
            return signs * math.sqrt(2 * self.scale)
        chances = has.detach().softmax(self.classes).movedim(self.classes, -1)
        rows = chances.flatten(0, -2)
        drawn = torch.multinomial(rows.float().cpu(), 1, generator=generator).to(has.device)
        one = torch.zeros_like(rows).scatter_(1, drawn, 1.0).reshape(chances.shape)
        return (chances - one).movedim(-1, self.classes) * math.sqrt(self.scale)

    def root(self, change: Tensor, has: Tensor) -> Tensor:
        """A change of the output as a vector: products of such vectors are what the curvature makes of the changes."""
        if self.classes is None:
            return change.flatten() * math.sqrt(2 * self.scale)
        chances = has.detach().softmax(self.classes)
        moved = change - (chances * change).sum(self.classes, keepdim=True)
        return ((self.scale * chances).sqrt() * moved).flatten()


class Variation:
    """Sums over the images of one output of a parent, from which its `Distance` follows.

    Attributes:
        classes: The axis of its classes; None where it has none.
    """

    def __init__(self, classes: int | None) -> None:
        self.classes = classes
        self._count = 0
        self._sum = self._square = self._chances = self._information = torch.zeros((), dtype=torch.float64)

    def add(self, wanted: Tensor) -> None:
        """Add a part of the images, along axis 0."""
        value = wanted.double()
        self._count += len(value)
        self._sum = self._sum + value.sum(0)
        self._square = self._square + value.square().sum()
        if self.classes is not None:
            told = value.log_softmax(self.classes)
            self._chances = self._chances + told.exp().sum(0)
            self._information = self._information + (told.exp() * told).sum()

    @property
    def total(self) -> float:
        """The sum of squares about the mean over the images; 0 where that is rounding."""
        found = float(self._square - self._sum.square().sum() / max(self._count, 1))
        return found if found > 1e-12 * float(self._square) else 0.0

    @property
    def spread(self) -> float:
        """The sum of the divergences of the mean probabilities; 0 where that is rounding."""
        chances = self._chances / max(self._count, 1)
        found = float(self._information - self._count * torch.xlogy(chances, chances).sum())
        return found if self.classes is not None and found > 1e-9 * self._count else 0.0

    def distance(self, share: float) -> Distance | None:
        """The distance, of which a whole output's variation is so much; None where it does not vary."""
        if not self.total:
            return None
        if self.spread:
            return Distance(share / self.spread, self.classes)
        return Distance(share / self.total)
