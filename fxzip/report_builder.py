"""The report of a merge, from what was merged and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzip.data.batches import with_batch_size
from fxzip.flops import flop_counter
from fxzip.matching import MergeMap
from fxzip.passes.choose import Tried
from fxzip.report import Cost, Report, SpaceRow, Verified
from fxzip.views.outline import outline

if TYPE_CHECKING:
    from fxzip.checks import Choice
    from fxzip.fitted import Fitted
    from fxzip.prepared import Prepared


def build_report(
    prepared: Prepared, maps: Mapping[str, MergeMap], choice: Choice, cut: str, start: str | None, fitted: Fitted,
    verified: Verified | None, tried: tuple[Tried, ...], names: tuple[str, ...],
) -> Report:  # fmt: skip
    """The report of one merge.

    Args:
        prepared: The networks.
        maps: The merge maps.
        choice: How the user wanted it.
        cut: Where the heads begin, in the user's words.
        start: Where merging starts, in the user's words; None for the input.
        fitted: Trunk and heads, and what was done to them.
        verified: What was checked.
        tried: What was tried to find the method.
        names: Of the heads.
    """
    parts = fitted.parts
    spec, modules = prepared.spec, prepared.alignment.modules
    args, kwargs = with_batch_size(*spec.example, 1)
    counts = prepared.places.counts  # raises where a model does not run on one
    trunk, crossing = measure_cost(parts.trunk, args, kwargs)
    heads = dict(zip(names, parts.heads, strict=True))

    def merged_in(node: str) -> tuple[str, ...]:
        """The merged spaces in a node's output."""
        return tuple(space.name for space, _, _ in spec.locate(node) if space.name in maps)

    return Report(
        names=names,
        method=str(choice),
        cut=cut,
        start=start,
        traced_by=tuple(str(module.meta.get("traced_by")) for module in modules),
        parting=prepared.alignment.parting,
        spaces=tuple(_row(prepared, space.name, maps[space.name]) for space in spec.spaces if space.name in maps),
        frozen=tuple(f"{space.name} ({space.size}): {space.reason}" for space in spec.frozen),
        coverage=spec.coverage,
        before=tuple(Cost(_params(module), counts.total) for module, counts in zip(modules, counts, strict=True)),
        trunk=trunk,
        heads=tuple(measure_cost(head, crossing, {})[0] for head in heads.values()),
        recalibrated=fitted.recalibrated,
        refitted=fitted.refitted,
        verified=verified,
        fidelity=fitted.fidelity,
        tried=tuple(map(str, tried)),
        layers=outline(parts.trunk, heads, args, kwargs, merged_in),
    )


def measure_cost(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Cost, Any]:
    """Parameters and floating-point operations of a module on one example, and what it gives."""
    with torch.no_grad(), flop_counter() as counter:
        result = module(*args, **kwargs)
    return Cost(_params(module), int(counter.get_total_flops())), result


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _row(prepared: Prepared, name: str, merge_map: MergeMap) -> SpaceRow:
    space, seen = prepared.spec[name], prepared.moments.get(name)
    correlation = None if seen is None else merge_map.mean_correlation(seen.correlation)
    if correlation is not None and math.isnan(correlation):  # no channel was matched with another
        correlation = None
    merged = None if merge_map.size == space.size else merge_map.size
    return SpaceRow(name, space.size, len(space.sites), correlation, merge_map.within_share, merged)
