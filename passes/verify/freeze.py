"""A spec without spaces that proved wrong: their channels are kept in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxzip.channels import ChannelSpace, ChannelSpec, FrozenSpace, Site


def without_spaces(spec: ChannelSpec, module: nn.Module, roots: Collection[str], reason: str) -> ChannelSpec:
    """The spec with some spaces, and all that lie in their blocks, kept in place.

    Args:
        spec: The channel spaces.
        module: The network that they are of.
        roots: Names of spaces.
        reason: Why.
    """
    gone = set(roots) | {below.name for name in roots for below in spec.inside(name)}
    kept = tuple(space for space in spec.spaces if space.name not in gone)
    frozen = tuple(FrozenSpace(s.name, s.size, reason) for s in spec.spaces if s.name in gone)
    number = torch.full((len(spec.spaces) + 1,), -1)
    for new, space in enumerate(kept):
        number[spec.spaces.index(space)] = new
    old = spec.layout.space
    layout = replace(
        spec.layout,
        space=number[torch.where(old < 0, len(spec.spaces), old)],
        frozen=spec.layout.frozen | ((old >= 0) & (number[old.clamp(min=0)] < 0)),
    )
    return replace(
        spec, spaces=kept, frozen=(*spec.frozen, *frozen), layout=layout, coverage=_coverage(module, spec, kept)
    )


def _coverage(module: nn.Module, spec: ChannelSpec, kept: Collection[ChannelSpace]) -> float:
    """The spec's coverage less what lay in the spaces that are gone only."""
    sizes = {name: p.shape for name, p in module.named_parameters()}
    total = sum(shape.numel() for shape in sizes.values())
    before, after = (_covered(sizes, spaces) for spaces in (spec.spaces, kept))
    return max(0.0, spec.coverage - (before - after) / max(total, 1))


def _covered(sizes: dict[str, torch.Size], spaces: Collection[ChannelSpace]) -> float:
    """How many elements of parameters lie in a space along at least one axis."""
    inside: dict[tuple[str, int], float] = defaultdict(float)
    for space in spaces:
        for site in space.sites:
            if site.parameter in sizes:
                inside[site.parameter, site.axis] += _share(site, sizes[site.parameter])
    found = 0.0
    for name, shape in sizes.items():
        outside = 1.0
        for axis in range(len(shape)):
            outside *= max(0.0, 1 - inside.get((name, axis), 0.0))
        found += shape.numel() * (1 - outside)
    return found


def _share(site: Site, shape: torch.Size) -> float:
    """The share of an axis that a site takes; inside groups that of the rows of its blocks."""
    if site.rows is None:
        return site.index.numel() / shape[site.axis]
    rows: Tensor = site.rows
    return rows.numel() / shape[0] * (len(site.index) / len(rows)) / shape[site.axis]
