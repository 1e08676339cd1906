"""Sizing: the numbers of channels of one merge, from what a user wants of its width or its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fxzip.channels import ChannelSpace
from fxzip.data.batches import with_batch_size
from fxzip.errors import OptionError
from fxzip.fidelity import Fidelity
from fxzip.matching.similarity import Floats
from fxzip.passes.allocate import Costs, allocate, curve, flops_terms, parameter_terms, same_width
from fxzip.passes.cut import MergePlan, Span
from fxzip.passes.split import split
from fxzip.report_builder import measure_cost
from fxzip.widths import Widths, chosen_blocks

if TYPE_CHECKING:
    from fxzip.prepared import Prepared

SIZED = "select"
"""The method that plans are made by where only their cost matters."""
TRIALS = 5
"""How often a budget is corrected by what the network costs in fact, or how many widths are tried for a fidelity."""


@dataclass(eq=False)
class Sizing:
    """The widths of one merge.

    Attributes:
        prepared: The networks.
        widths: What the user wants.
        span: What is merged.
        blocks: The numbers of channels (or blocks of channels) that were found, by family.
    """

    prepared: Prepared
    widths: Widths
    span: Span
    blocks: dict[str, int] = field(default_factory=dict)

    @cached_property
    def roots(self) -> list[ChannelSpace]:
        """The families that are merged as wholes."""
        spec = self.prepared.spec
        there = spec.with_parents(self.prepared.places.spaces(self.span))
        roots = [space for space in spec.spaces if space.parent is None and space.name in there]
        return [root for root in roots if all(below.name in there for below in spec.inside(root.name))]

    @cached_property
    def free(self) -> list[ChannelSpace]:
        """Those of them that can change."""
        return [root for root in self.roots if root.name not in self.prepared.fixed]

    @property
    def n_models(self) -> int:
        """How many networks are merged."""
        return len(self.prepared.names)

    def check(self) -> None:
        """Raise what can be known before anything is observed.

        Raises:
            OptionError: The width or the budget is not possible.
        """
        width, spec = self.widths.width, self.prepared.spec
        if width is not None:
            there = [root.name for root in self.roots]
            self.blocks = chosen_blocks(spec, width, self.prepared.fixed, there, self.n_models)
        elif self.widths.bound != "fidelity":
            least = self.costs(same_width(self.free, 0.0, self.n_models))
            if least > self.widths.limit:
                raise OptionError(f"budget={str(self.widths)!r}: the least that the merge can cost is {least:.3f}x")

    def find(self, make: Callable[[Mapping[str, int]], MergePlan]) -> None:
        """Find the numbers of channels, but for a bound on fidelity.

        Args:
            make: Makes a plan with such numbers.

        Raises:
            OptionError: The width or the budget is not possible.
        """
        self.check()
        if self.widths.bound in ("flops", "params"):
            self.blocks = self._within(self.widths.limit, make)

    def _within(self, limit: float, make: Callable[[Mapping[str, int]], MergePlan]) -> dict[str, int]:
        """As many channels as a budget allows, the cost of which is then counted."""
        aim, cost = limit, 0.0
        for _ in range(TRIALS):
            blocks = allocate(self.free, self._curves, self.costs, aim, self.n_models)
            cost = self._counted(make(blocks))
            if cost <= limit:
                return blocks
            aim -= 1.2 * (cost - limit)
        raise OptionError(f"budget={str(self.widths)!r}: the least that was found costs {cost:.3f}x")

    @cached_property
    def _curves(self) -> dict[str, Floats]:
        prepared = self.prepared
        return prepared.processes.agreed(
            "curves of the channel spaces",
            lambda: {root.name: curve(prepared.spec, root, prepared.moments, self.n_models) for root in self.free},
        )

    @cached_property
    def costs(self) -> Costs:
        """What the trunk costs, by the numbers of channels."""
        prepared, span = self.prepared, self.span
        modules, counts = prepared.alignment.modules, prepared.places.counts
        names = set(prepared.alignment.trunk_names(0)[span.begin : span.end])
        free = {root.name for root in self.free}
        if self.widths.bound == "params":
            peers = prepared.alignment.peers(span.end)
            own = [sum(p.numel() for p in module.parameters()) for module in modules]
            terms = parameter_terms(modules[0], prepared.spec, free, peers)
        else:
            own = [count.total for count in counts]
            terms = flops_terms(modules[0], prepared.spec, free, counts[0].flops, names)
        shared = sum(term.factor for term in terms)
        return Costs(terms, sum(own) - len(own) * shared, sum(own) / len(own))

    def _counted(self, plan: MergePlan) -> float:
        """What a merge costs by a plan, in networks."""
        args, kwargs = with_batch_size(*self.prepared.spec.example, 1)
        parts, modules = split(plan), plan.alignment.modules
        trunk, crossing = measure_cost(parts.trunk, args, kwargs)
        found = [trunk, *(measure_cost(head, crossing, {})[0] for head in parts.heads)]
        if self.widths.bound == "params":
            one = sum(p.numel() for module in modules for p in module.parameters()) / len(modules)
            return sum(cost.params for cost in found) / max(one, 1)
        return (
            sum(cost.flops for cost in found) * len(modules) / max(sum(c.total for c in self.prepared.places.counts), 1)
        )

    def keep_fidelity(self, measure: Callable[[], Fidelity | None]) -> None:
        """The narrowest trunk whose merge is as faithful as is wanted, by short fits.

        Args:
            measure: Merges with the present numbers, fits shortly, and measures.

        Raises:
            OptionError: None is, or nothing was held back.
        """
        if not self.prepared.held_back:
            raise OptionError(f"budget={str(self.widths)!r}: no image was held back, so fidelity cannot be measured")
        low, high, best = self.costs(same_width(self.free, 0.0, self.n_models)), float(self.n_models), 0.0
        good: dict[str, int] | None = None
        for trial in range(TRIALS + 1):
            aim = high if trial == 0 else (low + high) / 2
            self.blocks = allocate(self.free, self._curves, self.costs, aim, self.n_models)
            found = measure()
            score = found.score if found is not None else 0.0
            best = max(best, score)
            if score >= self.widths.limit:
                good, high = self.blocks, aim
            elif trial == 0:
                break
            else:
                low = aim
        if good is None:
            raise OptionError(
                f"budget={str(self.widths)!r}: the widest trunk that was tried keeps {best:.3f}; give more images, "
                "or merge fewer layers"
            )
        self.blocks = good
