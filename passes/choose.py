"""The choose pass: the method that fits these networks, found by trying some of them on a few images.

Which way of merging is best depends on the networks. Fine-tunes of one checkpoint may need no matching; networks that
learned different things keep more if whole channels are selected; alike ones, if channels are averaged. So each
candidate is merged, and fitted shortly, and the one wins that leaves the least of the parents' outputs unexplained on
images that no fit saw (`fxzip.fidelity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from fxzip.channels import ChannelSpec
from fxzip.errors import CutError
from fxzip.fidelity import Fidelity
from fxzip.matching import elsewhere, methods
from fxzip.passes.align import Alignment
from fxzip.settings import RefitOptions

CANDIDATES = ("select", "zip")
"""What is tried for any networks."""
RELATED = 0.3
"""Mean cosine of the networks' weights from which on they count as fine-tunes of one checkpoint."""
TRIED_RIDGE = 0.1
"""The ridge of short fits, where the user gives none: finding each layer's own would take most of their time."""


@dataclass(frozen=True)
class Short:
    """A fit that is short: each layer is solved once, on some of the images.

    Attributes:
        share: It takes one image of so many,
        least: but no fewer than these,
        most: and no more than these.
        samples: As of `RefitOptions`, at most.
        steps: Likewise.
        whole_heads: Whether it solves what lies deep in the heads, too.
    """

    share: int
    least: int
    most: int
    samples: int
    steps: int
    whole_heads: bool

    def images(self, count: int) -> int:
        """How many of so many images it is fitted on."""
        return min(max(count // self.share, self.least), self.most, count)

    def options(self, refit: RefitOptions | None) -> RefitOptions | None:
        """How it is fitted, where the merge is to be fitted so."""
        if refit is None:
            return None
        ridge = TRIED_RIDGE if refit.ridge is None else refit.ridge
        samples, steps = min(refit.samples, self.samples), min(refit.steps, self.steps)
        return replace(refit, rounds=0, polish=0, ridge=ridge, samples=samples, steps=steps, keep_norms=False)


OF_METHODS = Short(8, 32, 500, 2**14, steps=0, whole_heads=False)
"""By which methods are compared with one another."""
OF_BOUNDS = Short(4, 256, 1_000, 2**17, steps=2, whole_heads=True)
"""By which a merge is held against a bound on fidelity: it is to come near the fit in full."""


@dataclass(frozen=True)
class Tried:
    """What one candidate gave.

    Attributes:
        method: The matcher.
        unexplained: As of `fxzip.fidelity.Fidelity`.
        agreement: Likewise.
    """

    method: str
    unexplained: float
    agreement: float | None

    def __str__(self) -> str:
        shown = f"{self.unexplained:.1%} unexplained"
        if self.agreement is not None:
            shown = f"{self.agreement:.1%} agreement, {shown}"
        return f"{self.method} {shown}"


def candidates(alignment: Alignment, spec: ChannelSpec) -> tuple[str, ...]:
    """The methods that are worth a trial.

    `average` is the first where the networks come from one checkpoint; where spaces are linear, methods for these are
    the last.
    """
    kin = len(alignment.modules) > 1 and related(alignment) >= RELATED
    linear = any(space.linear for space in spec.spaces)
    return (*["average"] * kin, *CANDIDATES, *(filter(elsewhere, methods()) if linear else ()))


def related(alignment: Alignment) -> float:
    """The mean cosine of the networks' weight matrices with the first one's; about 0 for other initialisations."""
    states = [module.state_dict() for module in alignment.modules]
    found = []
    for names in alignment.peers(len(alignment.shared)).values():
        if any(name not in state for state, name in zip(states, names, strict=True)):
            continue  # a buffer that is not saved
        first, *others = (state[name] for state, name in zip(states, names, strict=True))
        if first.dim() > 1 and first.is_floating_point():
            pairs = [F.cosine_similarity(first.flatten().double(), o.flatten().double(), dim=0) for o in others]
            found.append(torch.stack(pairs).mean())
    return float(torch.stack(found).mean()) if found else 0.0


def choose(methods: Sequence[str], measure: Callable[[str], Fidelity | None]) -> tuple[str, tuple[Tried, ...]]:
    """The method with the least that is unexplained, and what each gave.

    Args:
        methods: The candidates; the first one wins where nothing can be measured.
        measure: Merges by a method, fits it shortly, and measures it.
    """
    tried = []
    for method in methods:
        found = measure(method)
        if found is None or not found.answers:
            return methods[0], ()
        tried.append(Tried(method, found.unexplained, found.agreement))
    return min(tried, key=lambda each: each.unexplained).method, tuple(tried)


def latest(cuts: Sequence[str], score: Callable[[str], float], least: float) -> str:
    """The latest cut whose merge scores at least so much, by bisection: the later the cut, the lower the score.

    Args:
        cuts: Names, in the order of execution.
        score: Of the merge with a cut, the greater the better.
        least: What is wanted.

    Raises:
        CutError: No cut that was tried scores so much; the best is named.
    """
    scores: dict[str, float] = {}

    def good(place: int) -> bool:
        scores[cuts[place]] = score(cuts[place])
        return scores[cuts[place]] >= least

    low, high = -1, len(cuts)  # all up to low are good, none from high on
    while high - low > 1:
        middle = high - 1 if high == len(cuts) else (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    if low < 0:
        best = max(scores, key=scores.__getitem__)
        raise CutError(
            f"no cut keeps a fidelity of {least:g}: the best that was tried, {best}, keeps {scores[best]:.3f}; "
            "give more images, or merge fewer layers"
        )
    return cuts[low]
