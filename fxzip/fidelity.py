"""`Fidelity`: how well a merged network answers as its parents do, on images that its fit did not see."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 0.9
"""Agreement below which a merge is warned of, if it was measured on ``MANY`` images or more."""
MANY = 32
CLEARLY = 0.02, 1e-4
"""By how much less is unexplained in a clearly better merge: this share of it, and this much at the least."""


@dataclass(frozen=True)
class Answer:
    """How one output of a head compares with that of its parent.

    Attributes:
        task: The head.
        output: Which of its outputs, as ``["logits"]`` or ``[0]``; empty where there is only one.
        unexplained: ‖y - ŷ‖² / ‖y - mean y‖², with y the parent's output and the mean over the images; 0 is a perfect
            copy, 1 no better than a constant.
        agreement: Share of the images (or positions) with the parent's class first; None where there are no classes.
        kl: Mean KL divergence of the parent's class probabilities from the head's, in nats; None likewise.
    """

    task: str
    output: str
    unexplained: float
    agreement: float | None = None
    kl: float | None = None

    @property
    def shown(self) -> str:
        """The figures in words."""
        unexplained = f"{self.unexplained:.1%} unexplained"
        if self.agreement is None:
            return unexplained
        return f"{self.agreement:.1%} agreement, KL {self.kl:.3f}, {unexplained}"


@dataclass(frozen=True)
class Depth:
    """How much of the parents' features the trunk loses at one merge point.

    Attributes:
        name: The channel space.
        node: The node of the trunk.
        unexplained: As of `Answer`, of each parent's features, found again by U.
    """

    name: str
    node: str
    unexplained: tuple[float, ...]


@dataclass(frozen=True)
class Fidelity:
    """A merge beside its parents.

    Attributes:
        images: How many images it was measured on.
        fitted: How many other images it was fitted on; 0 without refit.
        answers: Each head's outputs.
        depths: The merge points, in the order of execution.
    """

    images: int
    fitted: int
    answers: tuple[Answer, ...]
    depths: tuple[Depth, ...] = ()

    @property
    def agreement(self) -> float | None:
        """The mean over the tasks of the agreement; None where no output has classes."""
        found = [answer.agreement for answer in self.answers if answer.agreement is not None]
        return statistics.fmean(found) if found else None

    @property
    def unexplained(self) -> float:
        """The mean over the outputs of the unexplained share."""
        return statistics.fmean(answer.unexplained for answer in self.answers) if self.answers else 0.0

    @property
    def score(self) -> float:
        """One number, the greater the better and at most 1: the agreement, or the explained share without classes."""
        found = self.agreement
        return 1 - self.unexplained if found is None else found

    def clearly_better_than(self, other: Fidelity) -> bool:
        """Whether it leaves less unexplained, by more than chance and rounding."""
        gain = other.unexplained - self.unexplained
        return gain > max(CLEARLY[0] * other.unexplained, CLEARLY[1])

    @property
    def advice(self) -> str | None:
        """What helps where the agreement is low; None where it is not."""
        found = self.agreement
        if found is None or found >= ENOUGH or self.images < MANY:
            return None
        seen = f" ({self.fitted:,} were used)" if self.fitted else ""
        return (
            f"the merged network answers as its parents do on {found:.0%} of {self.images:,} images that its fit did "
            f"not see; more images{seen}, an earlier cut or a greater budget of FLOPs bring it closer"
        )

    def of(self, task: str) -> Sequence[Answer]:
        """The answers of one head."""
        return [answer for answer in self.answers if answer.task == task]

    def __str__(self) -> str:
        parts = [f"{answer.task}{answer.output}: {answer.shown}" for answer in self.answers]
        return f"{'; '.join(parts)} (on {self.images:,} images that the fit did not see)"
