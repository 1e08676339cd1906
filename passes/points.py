"""Points: the merge points of each channel space, the tensors whose activations decide its map."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from fxzip.channels import ChannelSpace, ChannelSpec, Located, MergePoint
from fxzip.errors import OptionError
from fxzip.rules import kind_of, target_of

Points = Literal["last", "all"]


def merge_points(
    module: fx.GraphModule, spec: ChannelSpec, nodes: Sequence[str], points: Points = "last"
) -> dict[str, tuple[MergePoint, ...]]:
    """Where to observe each space: the inputs of the operations that its channels end in.

    A channel ends where weights contract it (or a norm over a head, or the end of ``nodes``). Operations that
    only move or pool are stepped back over, to the activation itself.

    Args:
        module: The traced network.
        spec: Its spaces. Spaces of blocks are decided by what lies in the blocks, where that is observed, and
            have no points then; nor have spaces of one channel, which leave nothing to decide.
        nodes: Names of the nodes that may be observed, in graph order.
        points: ``last`` is the paper's choice (arXiv 2305.03053, section 5: one for each residual stage, its
            last activation); ``all`` pools every place where the space ends.

    Raises:
        OptionError: ``points`` is neither.
    """
    check_points(points)
    allowed = set(nodes)
    found: dict[str, list[MergePoint]] = {}
    for node in module.graph.nodes:
        if node.name not in allowed:
            continue
        for space, _, _ in spec.locate(node.name):
            if space.size > 1 and _ends(node, space, spec, allowed):
                point = _origin(module, node, space, spec)
                mine = found.setdefault(space.name, [])
                if all(point.node != other.node for other in mine):
                    mine.append(point)
    keep = slice(-1, None) if points == "last" else slice(None)
    decided = {above for name in found for above in _blocks_of(spec, name)}
    return {name: tuple(mine[keep]) for name, mine in found.items() if name not in decided}


def check_points(points: object) -> None:
    """Raise OptionError unless ``points`` is ``last`` or ``all``."""
    if points not in get_args(Points):
        raise OptionError(f"points={points!r} is unknown; use 'last' or 'all'")


def _blocks_of(spec: ChannelSpec, name: str) -> Iterator[str]:
    """The spaces of the blocks that a space's channels lie in, from the inside out."""
    parent = spec[name].parent
    while parent is not None:
        yield parent
        parent = spec[parent].parent


def _ends(node: fx.Node, space: ChannelSpace, spec: ChannelSpec, allowed: Collection[str]) -> bool:
    """Whether some user of the node's output does not hand the space on."""
    return any(
        user.name not in allowed or all(other is not space for other, _, _ in spec.locate(user.name))
        for user in node.users
    )


def _origin(module: fx.GraphModule, node: fx.Node, space: ChannelSpace, spec: ChannelSpec) -> MergePoint:
    """The activation that a node's output was moved or pooled from."""
    place = _place(node, space, spec)
    while node.op not in ("placeholder", "get_attr") and kind_of(target_of(module, node)) == "passive":
        sources = [(n, _place(n, space, spec)) for n in node.all_input_nodes]
        sources = [(n, found) for n, found in sources if found is not None]
        if len(sources) != 1:
            break
        node, place = sources[0]
    assert place is not None
    axes, index = place
    others = [other for other in spec.locate(node.name) if other[2] is not index]  # it may lie along two axes itself
    pooled = {axis for _, found, _ in others for axis in found if axis not in axes}
    factors = spec.layout.factors[node.name]
    sizes = [max(factor.shape[axis] for factor in factors) for axis in range(factors[0].dim())]
    return MergePoint(node.name, axes, index, tuple(sorted(pooled)), _mixed(axes, index, sizes, others))


def _mixed(axes: Sequence[int], index: Tensor, sizes: Sequence[int], others: Sequence[Located]) -> bool:
    """Whether copies of one channel lie at different channels of another space, along axes that the two share.

    Args:
        axes: Where the channels lie.
        index: Their places in the product of these axes, (channels, copies).
        sizes: Of all axes of the node's output.
        others: The other spaces there.
    """
    for space, found, where in others:
        shared = [axis for axis in axes if axis in found]
        channel = torch.full([math.prod(sizes[axis] for axis in found)], -1)
        channel[where] = torch.arange(space.size)[:, None]
        grid = channel.reshape([sizes[axis] for axis in found]).permute(
            [found.index(axis) for axis in (*shared, *(axis for axis in found if axis not in shared))]
        )
        sets = grid.reshape(math.prod(grid.shape[: len(shared)]), -1).sort(1).values  # along the rest it is pooled
        number = torch.where((sets >= 0).any(1), sets.unique(dim=0, return_inverse=True)[1], -1)
        spread = number.reshape([sizes[axis] if axis in shared else 1 for axis in axes])
        here = spread.expand([sizes[axis] for axis in axes]).reshape(-1)[index]
        first = here.amax(1, keepdim=True)
        if bool(((here != first) & (here >= 0)).any()):
            return True
    return False


def _place(node: fx.Node, space: ChannelSpace, spec: ChannelSpec) -> tuple[tuple[int, ...], Tensor] | None:
    for other, axes, index in spec.locate(node.name):
        if other is space:
            return axes, index
    return None
