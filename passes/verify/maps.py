"""True maps: how a network and its permuted copy are merged without any error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

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
    return {name: _true_map(found, orders[name], generator) for name, found in plan.maps.items()}


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
