"""Places: what lies between the start and the cut of a merge, and what each place costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fxzip.channels import ChannelSpec
from fxzip.errors import CutError
from fxzip.passes.align import Alignment
from fxzip.passes.cut.budget import Counts, cost_of_cuts, cost_of_joins, count, cut_within, parse_budget, parse_fidelity
from fxzip.passes.cut.cut import Cut, Cuts, check_cut, crossing


@dataclass(frozen=True)
class Span:
    """What is merged, among the shared nodes.

    Attributes:
        begin: The number of shared nodes before it; they are run as each model has them.
        end: The number of shared nodes before the heads.
    """

    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Places:
    """Where aligned models can be merged, and what it costs.

    Attributes:
        alignment: The traced models and the nodes that they share.
        spec: The channel spaces.
        cuts: The places where heads may begin.
    """

    alignment: Alignment
    spec: ChannelSpec
    cuts: Cuts

    def span(self, cut: Cut, start: Cut = None) -> Span:
        """What a user's cut and start mean.

        Raises:
            CutError: The cut or the start is unknown or invalid, no cut meets the budget, or the layers between share
                no channel space.
        """
        check_span(cut, start)
        cut = None if parse_fidelity(cut) is not None else cut  # the latest that keeps it, this one at most
        begin, budget = self._begin(start), parse_budget(cut)
        end = self.cuts.resolve(cut) if budget is None else cut_within(self.costs_from(begin), budget)
        span = Span(begin, end)
        layers = self.has_layers(span)
        if begin and not layers:
            raise CutError(f"start={start!r}: no layer is left to merge before the cut at {self.name_of(end)}")
        if cut is None and not layers:
            raise CutError(f"no layer comes before the place where the heads begin: {self.cuts.reason}")
        if layers and not self.spaces(span):
            frozen = "; ".join(f"{f.name}: {f.reason}" for f in self.spec.frozen[:3])
            why = frozen or "each channel there has a place of its own, so that none can stand for another"
            raise CutError(f"cut={cut!r}: the layers before it share no channel space that can be merged; {why}")
        return span

    def _begin(self, start: Cut) -> int:
        if start is None:
            return 0
        begin = self.cuts.resolve(start, "start")
        joined_channels(self.alignment, self.spec, begin)  # raises where they cannot be
        return begin

    def has_layers(self, span: Span) -> bool:
        """Whether there is a layer with weights to merge."""
        return any(span.begin <= layer < span.end for layer in self.cuts.layers)

    def spaces(self, span: Span) -> set[str]:
        """The names of the spaces that need a map: those in the span, and in what crosses into it."""
        names = self.alignment.trunk_names(0)
        early = crossing(self.alignment, span.begin) if span.begin else ()
        nodes = [*names[span.begin : span.end], *(names[i] for i in early)]
        return {space.name for node in nodes for space, _, _ in self.spec.locate(node)}

    @cached_property
    def counts(self) -> tuple[Counts, ...]:
        """What the nodes of each model do for one example: every model is run once."""
        return tuple(count(module, self.spec.example) for module in self.alignment.modules)

    @cached_property
    def costs(self) -> dict[int, float]:
        """What a merge costs, by the place of its cut, in multiples of the mean model's FLOPs."""
        places = [place for place in self.cuts.valid if place <= self.cuts.default]
        return cost_of_cuts(self.alignment, places, self.counts)

    def costs_from(self, begin: int) -> dict[int, float]:
        """The same of merges with a start: what comes before it is run for each model, and then joined."""
        if not begin:
            return self.costs
        again = len(self.alignment.modules) - self.costs[begin]
        joined = joined_channels(self.alignment, self.spec, begin)
        again += cost_of_joins(self.alignment, joined, self.counts)
        return {place: cost + again for place, cost in self.costs.items() if place > begin}

    def spread(self, number: int = 8) -> list[Cut]:
        """Cuts that merge something, at equal shares of the layers, and the last one."""
        shares = {self.cuts.resolve(k / number): k / number for k in range(1, number)}
        return [*(share for place, share in shares.items() if self.spaces(Span(0, place))), None]

    def shown(self, cut: Cut, place: int) -> str:
        """A cut as its user named it."""
        return cut if isinstance(cut, str) and parse_budget(cut) is None else self.name_of(place)

    def name_of(self, place: int) -> str:
        """The name of the module or node that begins at a place."""
        return next((name for name, at in self.cuts.named.items() if at == place), "the output")


def check_span(cut: object, start: object = None) -> None:
    """Raise what is wrong with a cut and a start in any network.

    Raises:
        CutError: One is neither a name nor a share nor None, is a share out of range, or a budget that cannot be read.
    """
    check_cut(cut, "cut")
    check_cut(start, "start")
    if parse_fidelity(cut) is None:
        parse_budget(cut)
    if parse_budget(start) is not None or parse_fidelity(start) is not None:
        raise CutError(f"start={start!r}: give the name of a module or node, or a share of the layers")


def joined_channels(alignment: Alignment, spec: ChannelSpec, begin: int) -> dict[int, int]:
    """How many positions there are along the channels' axis of each tensor with channels that crosses at a start.

    Returns:
        By the places of the shared nodes.

    Raises:
        CutError: A tensor has channels along several axes (a Mixer's tokens and channels), or of several kinds along
            one: one matrix cannot join it.
    """
    found: dict[int, int] = {}
    for place in crossing(alignment, begin):
        node = alignment.shared[place][0]
        axes = {axis for _, axes, _ in spec.locate(node) for axis in axes}
        if len(axes) > 1:
            raise CutError(f"start: the tensor {node} there has channels along {len(axes)} axes; choose another start")
        for axis in axes:
            found[place] = max(factor.shape[axis] for factor in spec.layout.factors[node])
            if sum(index.numel() for space, _, index in spec.locate(node) if space.size > 1) > found[place]:
                raise CutError(
                    f"start: the tensor {node} there has several channels at one place; choose another start"
                )
    return found
