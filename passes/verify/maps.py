"""True maps: how a network and its permuted copy are merged without any error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from fxzip.matching import MergeMap
from fxzip.passes.cut import MergePlan


def true_maps(plan: MergePlan, orders: Mapping[str, Tensor], generator: Generator) -> dict[str, MergeMap]:
    """The maps of a network and its permuted copy, of the kind that the plan's own maps are of.

    Channels are averaged where the plan averages them, and are kept from either of the two, at random, where it keeps
    some and finds the others by them; U is a matrix where the plan's is one.

    Args:
        plan: What is asked for.
        orders: For each space the source channel of each channel of the copy, (size,).
        generator: The source of randomness.
    """
    if plan.resized is None:
        return {name: _true_map(found, orders[name], generator) for name, found in plan.maps.items()}
    places = {root: _block_places(plan.spec[root].size, n, generator) for root, n in plan.resized.blocks.items()}
    return {name: _resized_map(plan, name, orders[name], places, generator) for name in plan.maps}


def _true_map(wanted: MergeMap, order: Tensor, generator: Generator) -> MergeMap:
    size = len(order)
    both = MergeMap.from_assignment(torch.cat([torch.arange(size), order]), 2)
    averages = wanted.sparse is not None and bool((wanted.sparse[1] < 1).any())
    if averages or wanted.n_models < 2:
        return both
    first = torch.rand(size, generator=generator) < 0.5
    kept = torch.where(first, torch.arange(size), size + torch.argsort(order))
    chosen = MergeMap.from_selection(kept, both.unmerge, 2)
    return MergeMap(2, None, (chosen.merge, chosen.unmerge)) if wanted.sparse is None else chosen


def without_left_out(plan: MergePlan, module: nn.Module, orders: Mapping[str, Tensor], generator: Generator) -> None:
    """Take away what a network makes of the channels that a plan leaves out: then it can be merged without error.

    Args:
        plan: What is asked for.
        module: The network; it is changed.
        orders: As of `true_maps`.
        generator: In the state in which `true_maps` gets it.
    """
    if plan.resized is None:
        return
    places = {root: _block_places(plan.spec[root].size, n, generator) for root, n in plan.resized.blocks.items()}
    state = module.state_dict(keep_vars=True)
    for space in plan.spec.spaces:
        kept = places.get(plan.spec.root(space.name).name)
        if kept is None or space.name not in plan.maps:
            continue
        gone = kept[0][plan.spec.units[space.name]] < 0
        for site in space.sites if bool(gone.any()) else ():
            if site.role == "contract" and site.rows is None:
                with torch.no_grad():
                    index = site.index[gone].reshape(-1).to(state[site.parameter].device)
                    state[site.parameter].index_fill_(site.axis, index, 0.0)


def _block_places(blocks: int, merged: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """For each block of a network its merged block, and that of the copy's block of the same channels; -1: left out.

    Of more merged blocks than a network has some are those of the copy alone, at random.
    """
    mine = torch.randperm(blocks, generator=generator)
    if merged < blocks:
        places = torch.full((blocks,), -1)
        places[mine[:merged].sort().values] = torch.arange(merged)
        return places, places
    apart = mine[: merged - blocks].sort().values
    other = torch.arange(blocks)
    other[apart] = torch.arange(blocks, blocks + len(apart))
    return torch.arange(blocks), other


def _resized_map(
    plan: MergePlan, name: str, order: Tensor, places: Mapping[str, tuple[Tensor, Tensor]], generator: Generator
) -> MergeMap:
    """The map of a space whose blocks come to lie at these places."""
    root, wanted = plan.spec.root(name), plan.maps[name]
    if root.name not in places:
        return _true_map(wanted, order, generator)
    unit, width = plan.spec.units[name], plan.spec[name].size // root.size
    offset = torch.arange(len(unit)) - unit * width
    own, others = (torch.where(at[unit] >= 0, at[unit] * width + offset, -1) for at in places[root.name])
    target = torch.cat([own, others[order]])
    there = target >= 0
    if wanted.sparse is not None and bool((wanted.sparse[1] < 1).any()):
        times = target[there].bincount(minlength=wanted.size)
        weight = torch.where(there, 1.0 / times[target.clamp(min=0)].double(), 0.0)
    else:
        weight = torch.zeros(len(target), dtype=torch.float64)
        shuffled = torch.randperm(len(target), generator=generator)
        last = torch.full((wanted.size,), -1).scatter_(0, target[shuffled][there[shuffled]], shuffled[there[shuffled]])
        weight[last[last >= 0]] = 1.0
    blocks = bool((target < 0).any()) and (root.name != name or bool(plan.spec.children(name)))
    found = MergeMap(2, (target.clamp(min=0), weight), n_out=wanted.size)
    if wanted.sparse is not None and not blocks:
        return found
    return MergeMap(2, None, (found.merge, found.unmerge * there[:, None]))
