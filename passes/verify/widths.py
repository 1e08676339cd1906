"""Widths: which channel spaces can have other numbers of channels, found by trying.

Rules say of most operations what becomes of the numbers in a graph (`fxzip.rules.sizes`), and which of them depend on
how many channels there are (`fxzip.labelling.counting`). What neither knows is found here: the network is made wider in
all spaces at once and merged with itself. Where that fails at a node, the spaces that lie there are to blame; where
only the outputs are others, the one that is to blame is found by halving.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fxzip.channels import ChannelSpec
from fxzip.matching import MergeMap
from fxzip.passes.align import align
from fxzip.passes.cut import MergePlan
from fxzip.passes.resize import ResizeError, resize
from fxzip.passes.verify.verify import Verifier


def fixed_sizes(verifier: Verifier, spec: ChannelSpec) -> dict[str, str]:
    """The spaces that lie in no other's blocks and must keep their number of channels, each with the reason.

    Args:
        verifier: Of the network.
        spec: Its channel spaces.
    """
    found = {s.name: s.fixed for s in spec.spaces if s.parent is None and s.fixed is not None}
    found |= {s.name: "it has one channel" for s in spec.spaces if s.parent is None and s.size == 1}
    free = [s for s in spec.spaces if s.parent is None and s.name not in found]
    wider = {space.name: space.size + 1 + number % 3 for number, space in enumerate(free)}
    wider = {name: min(size, 2 * spec[name].size) for name, size in wider.items()}
    while wider and (fault := _fault(verifier, spec, wider)) is not None:
        reason, node = fault
        blamed = _at(verifier, spec, node) & wider.keys() or {_to_blame(verifier, spec, wider)}
        found |= dict.fromkeys(sorted(blamed), reason)
        wider = {name: size for name, size in wider.items() if name not in blamed}
    return found


def _at(verifier: Verifier, spec: ChannelSpec, node: str) -> set[str]:
    """The families whose channels lie in what a node takes and gives; none where there is no such node."""
    here = next((n for n in verifier.module.graph.nodes if n.name == node), None)
    names = [] if here is None else [node, *(source.name for source in here.all_input_nodes)]
    labels = [factor.reshape(-1) for name in names for factor in spec.layout.factors.get(name, ())]
    numbers = torch.cat([spec.layout.space[each] for each in labels]).unique().tolist() if labels else []
    own = {spec.spaces[number].name for number in numbers if number >= 0}
    called = f"{here.target}." if here is not None and here.op == "call_module" else " "
    own |= {space.name for space in spec.spaces if any(site.parameter.startswith(called) for site in space.sites)}
    return {spec.root(name).name for name in own}


def _to_blame(verifier: Verifier, spec: ChannelSpec, wider: Mapping[str, int]) -> str:
    """The last of the first families that fail together, found by halving."""
    names, low, high = list(wider), 0, len(wider)
    while high - low > 1:
        middle = (low + high) // 2
        fails = _fault(verifier, spec, {name: wider[name] for name in names[:middle]}) is not None
        low, high = (low, middle) if fails else (middle, high)
    return names[high - 1]


def _fault(verifier: Verifier, spec: ChannelSpec, blocks: Mapping[str, int]) -> tuple[str, str] | None:
    """Why a network cannot have these numbers of channels, and at which node; None if it can."""
    try:
        error = width_error(verifier, spec, blocks)
    except ResizeError as problem:
        return str(problem), problem.node
    if verifier.allows(error):
        return None
    return f"with another number of channels its outputs are off by {error:.1e}", ""


def width_error(
    verifier: Verifier, spec: ChannelSpec, blocks: Mapping[str, int], averaged: Collection[str] | None = None
) -> float:
    """How far a network is off that is merged, from its inputs to its outputs, with a copy of itself in other sizes.

    Args:
        verifier: Of the network.
        spec: Its channel spaces.
        blocks: As of `fxzip.passes.resize.resize`; no more than twice as many as there are.
        averaged: The spaces whose channels are averaged, those of all others are kept from either; None: all.

    Raises:
        ResizeError: It cannot have them.
    """
    resized = resize(verifier.module, spec, blocks)
    maps = {}
    for space, new in zip(spec.spaces, resized.spec.spaces, strict=True):
        assignment = torch.arange(2 * space.size).clamp(max=new.size - 1)
        assignment[: space.size] = torch.arange(space.size) % new.size
        if new.size <= space.size:
            assignment = torch.arange(space.size).repeat(2) % new.size
        merge_map = MergeMap.from_assignment(assignment, 2)
        if averaged is not None and space.name not in averaged:
            merge_map = MergeMap(2, None, (merge_map.merge, merge_map.unmerge))
        maps[space.name] = merge_map
    alignment = align([verifier.module])
    return verifier.merge_error(MergePlan(alignment, spec, maps, 0, len(alignment.shared), resized))
