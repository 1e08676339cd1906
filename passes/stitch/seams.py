"""Seams: which spots of two networks are tried to stitch them at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fxzip.errors import AlignmentError, CutError
from fxzip.passes.cut.budget import Counts, parse_budget, parse_fidelity
from fxzip.passes.cut.cut import Cut
from fxzip.passes.stitch.spots import Spot, Spots
from fxzip.passes.stitch.weave import fits, operations

BUDGET = 1.5
"""What a stitched network may cost where the user says nothing, in multiples of the mean network's FLOPs."""
PLACES, NEAREST = 3, 2
"""So many spots to go on at are tried in each network, and with each so many to leave the other one at."""


@dataclass(frozen=True, eq=False)
class Seam:
    """One network is left at a spot, and another goes on at one.

    Attributes:
        trunk: Where the one that begins is left: it gives the trunk, and stays as it is.
        rest: Where the other one goes on.
        cost: What all costs, in multiples of the mean network's FLOPs.
    """

    trunk: Spot
    rest: Spot
    cost: float

    def shown(self, names: Sequence[str]) -> str:
        """Both spots, by the networks' tasks."""
        first, second = names[self.trunk.model], names[self.rest.model]
        return f"{self.trunk.name} of {first}, stitched to {self.rest.name} of {second}"


@dataclass(frozen=True)
class Wanted:
    """What a user's cut means here.

    Attributes:
        budget: The most that may be paid, in multiples of the mean network's FLOPs; None: it is not bounded.
        fidelity: The least that is to be kept, as cheaply as can be; None: as much as can be.
        cut: Where the trunk ends: a name, or a share of its network's layers; None: where it is best.
    """

    budget: float | None = None
    fidelity: float | None = None
    cut: str | float | None = field(default=None)

    @classmethod
    def of(cls, cut: Cut) -> Wanted:
        """From ``cut`` as `fxzip.zip` takes it.

        Raises:
            CutError: It cannot be read.
        """
        budget, fidelity = parse_budget(cut), parse_fidelity(cut)
        if budget is not None:
            return cls(budget=budget)
        if fidelity is not None:
            return cls(fidelity=fidelity)
        return cls(budget=BUDGET) if cut is None else cls(cut=cut)


def seams(wanted: Wanted, spots: Sequence[Spots], counts: Sequence[Counts]) -> list[Seam]:
    """The seams that are tried, the cheapest first: few, and those that are likely to be good.

    A network that goes on early keeps more than one that goes on late, and costs more; and features fit best those of
    about the same depth.

    Raises:
        CutError: None is as it is wanted; the nearest, or the cheapest, are named.
        AlignmentError: No tensor of one network can be mapped onto one of the other.
    """
    every = list(_every(spots, counts))
    if not every:
        raise AlignmentError(
            "the networks cannot be stitched: at no place does one tensor cross each of them with channels along one "
            "axis and with the same number of positions, or as maps of height and width"
        )
    if wanted.cut is not None:
        chosen = _left_at(wanted.cut, spots)
        found = [seam for spot in chosen for seam in _nearest([s for s in every if s.trunk is spot], spot.depth)]
        if not found:
            raise CutError(f"cut={wanted.cut!r}: no tensor of the other network can be mapped from what crosses there")
    elif wanted.budget is not None:
        allowed = [seam for seam in every if seam.cost <= wanted.budget]
        if not allowed:
            raise CutError(
                f"no stitched network costs at most {wanted.budget:g} networks' FLOPs; the cheapest costs "
                f"{min(seam.cost for seam in every):.3f}"
            )
        found = [seam for model in range(2) for seam in _early([s for s in allowed if s.rest.model == model], PLACES)]
    else:
        found = [seam for model in range(2) for seam in _spread([s for s in every if s.rest.model == model])]
    return sorted(found, key=lambda seam: seam.cost)


def _every(spots: Sequence[Spots], counts: Sequence[Counts]) -> Iterator[Seam]:
    """All pairs of spots that fit, with what they cost."""
    mean = max(sum(each.total for each in counts) / len(counts), 1)
    for first, second in ((0, 1), (1, 0)):
        flops = list(counts[second].flops.values())
        for rest in spots[second].entering:
            cost = counts[first].total + sum(flops[rest.end :])
            for trunk in {id(spot): spot for spot in (*spots[first].leaving, *spots[first].every)}.values():
                if 0 < trunk.depth < 1 and fits(trunk, rest):
                    yield Seam(trunk, rest, (cost + operations(trunk, rest)) / mean)


def _left_at(cut: str | float, spots: Sequence[Spots]) -> list[Spot]:
    """Where the trunk ends, in each network that has such a place.

    Raises:
        CutError: None has.
    """
    if not isinstance(cut, str):
        return [max((s for s in each.leaving if s.depth <= cut), key=lambda s: s.end, default=each.leaving[0])
                for each in spots if each.leaving]  # fmt: skip
    found = [spot for spot in (each.at(cut) for each in spots) if spot is not None]
    if not found:
        near = ", ".join(name for each in spots for name in each.near(cut))
        raise CutError(f"cut={cut!r}: neither network has a module or node of that name; valid nearby: {near}")
    return found


def _early(found: Sequence[Seam], number: int) -> list[Seam]:
    """The seams whose networks go on earliest, each with the spots of about its depth."""
    places = sorted({seam.rest.end for seam in found})[:number]
    return [seam for place in places for seam in _about([s for s in found if s.rest.end == place])]


def _spread(found: Sequence[Seam]) -> list[Seam]:
    """Seams from all of a network, the spots of both of about the same depth."""
    places = sorted({seam.rest.end for seam in found})
    some = places[:: max(1, len(places) // (2 * PLACES))]
    return [seam for place in some for seam in _about([s for s in found if s.rest.end == place], 1)]


def _about(found: Sequence[Seam], number: int = NEAREST) -> list[Seam]:
    """Of seams with one spot to go on at, those that are left behind a layer's activation at about its depth."""
    return sorted(_tidy(found), key=lambda seam: abs(seam.trunk.depth - seam.rest.depth))[:number]


def _nearest(found: Sequence[Seam], depth: float) -> list[Seam]:
    """Of seams with one spot to leave at, those that go on at about this depth."""
    return sorted(found, key=lambda seam: abs(seam.rest.depth - depth))[:PLACES]


def _tidy(found: Sequence[Seam]) -> list[Seam]:
    """Of the spots with as many layers before them, and tensors of one rank, the last."""
    last: dict[tuple[float, int], Seam] = {}
    for seam in found:
        key = seam.trunk.depth, len(seam.trunk.shape)
        if key not in last or last[key].trunk.end < seam.trunk.end:
            last[key] = seam
    return list(last.values())
