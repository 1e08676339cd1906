"""Spots: where one tensor crosses a network, so that another network's features can stand in its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxzip.channels import ChannelSpec
from fxzip.errors import CutError
from fxzip.passes.align import Alignment
from fxzip.passes.cut import find_cuts, is_layer


@dataclass(frozen=True, eq=False)
class Spot:
    """A place where a single tensor crosses.

    Attributes:
        model: The number of the network.
        node: The tensor's node.
        end: The number of nodes before the place.
        axis: Where the tensor's channels lie.
        shape: Its shape, without the batch.
        depth: The share of the network's layers that come before.
        name: The module or node that begins there.
    """

    model: int
    node: fx.Node
    end: int
    axis: int
    shape: tuple[int, ...]
    depth: float
    name: str

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.shape[self.axis - 1]

    @property
    def grid(self) -> tuple[int, ...]:
        """The positions that each of the channels has: (height, width) of a map, () of a vector."""
        return tuple(size for axis, size in enumerate(self.shape, 1) if axis != self.axis)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        value: Tensor = self.node.meta["val"]
        return value.dtype


@dataclass(frozen=True, eq=False)
class Spots:
    """The spots of one network.

    Attributes:
        named: The place of each module and node.
        every: All spots, in order.
        leaving: Where a trunk may end: behind the activation and the pooling that follow a layer.
        entering: Where a network may go on: just behind a layer, so that its own activation comes after.
    """

    named: Mapping[str, int]
    every: tuple[Spot, ...]
    leaving: tuple[Spot, ...]
    entering: tuple[Spot, ...]

    def at(self, name: str) -> Spot | None:
        """The spot of a module or node; None where the network has none of that name.

        Raises:
            CutError: More than one tensor crosses there, or nothing is before or behind it; the nearest are named.
        """
        if name not in self.named:
            return None
        place = self.named[name]
        found = next((spot for spot in self.every if spot.end == place and 0 < spot.depth < 1), None)
        if found is None:
            near = sorted(self.leaving, key=lambda spot: abs(spot.end - place))[:4]
            raise CutError(
                f"cut={name!r}: a network cannot be stitched there, since not one tensor with channels along one axis "
                f"crosses, with layers before and behind it; possible nearby: {', '.join(spot.name for spot in near)}"
            )
        return found

    def near(self, name: str) -> list[str]:
        """Names of spots that are written alike."""
        return difflib.get_close_matches(name, [spot.name for spot in self.leaving], n=3, cutoff=0.3)


def find_spots(model: int, alignment: Alignment, spec: ChannelSpec) -> Spots:
    """The spots of one network.

    Args:
        model: Its number.
        alignment: Of it alone.
        spec: Its channel spaces.
    """
    cuts = find_cuts(alignment, spec)
    (module,) = alignment.modules
    nodes = [node for node in module.graph.nodes if node.op != "output"]
    layers = [is_layer(module, node) for node in nodes]
    called = {place: name for name, place in reversed(cuts.named.items())}
    every: list[Spot] = []
    groups: dict[tuple[int, int], list[Spot]] = {}
    for end, node in _crossings(nodes, alignment.learned[0]):
        found = _axis(spec, node)
        if found is None:
            continue
        axis, shape = found
        before = sum(layers[:end])
        spot = Spot(model, node, end, axis, shape, before / max(sum(layers), 1), called.get(end, "the output"))
        every.append(spot)
        groups.setdefault((before, len(shape)), []).append(spot)
    some = [group for group in groups.values() if group[0].depth > 0]
    leaving = tuple(group[-1] for group in some if group[0].depth < 1)
    return Spots(cuts.named, tuple(every), leaving, tuple(group[0] for group in some))


def _crossings(nodes: list[fx.Node], learned: frozenset[str]) -> Iterator[tuple[int, fx.Node]]:
    """Each place where a single node's value crosses, as the number of nodes before it, and that node."""
    order = {node: i for i, node in enumerate(nodes)}
    alive: dict[fx.Node, int] = {}
    for end, node in enumerate(nodes, 1):
        if node.name not in learned:
            alive[node] = max((order.get(user, len(nodes)) for user in node.users), default=-1)
        alive = {each: last for each, last in alive.items() if last >= end}
        if len(alive) == 1:
            yield end, next(iter(alive))


def _axis(spec: ChannelSpec, node: fx.Node) -> tuple[int, tuple[int, ...]] | None:
    """The axis of a tensor's channels, and its shape without the batch; None where it is not of one kind of channel."""
    value, factors = node.meta.get("val"), spec.layout.factors.get(node.name, ())
    if not isinstance(value, Tensor) or not value.is_floating_point() or not factors:
        return None
    axes = {axis for factor in factors for axis, size in enumerate(factor.shape) if size > 1}
    sizes = tuple(value.shape[1:])
    if len(axes) != 1 or 0 in axes or node.name in spec.layout.bundles:
        return None
    if not all(isinstance(size, int) for size in sizes):
        return None
    (axis,) = axes
    return (axis, sizes) if axis in (1, len(sizes)) else None
