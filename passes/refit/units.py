"""The units that refit solves: layers, and layers that end in one sum, up to where targets are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxzip.graphs import is_static
from fxzip.passes.refit.layers import Layer, find_layer
from fxzip.passes.refit.slots import Uses
from fxzip.rules.calls import shape_of
from fxzip.rules.keys import key_of


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers that are solved together.

    Attributes:
        root: The node where the target is taken: a layer's end, or the sum that layers end in.
        layers: The unknowns.
        known: What else is summed at the root.
    """

    root: fx.Node
    layers: tuple[Layer, ...]
    known: tuple[fx.Node, ...] = ()

    @property
    def claimed(self) -> set[fx.Node]:
        """The nodes that can run only once the unit is solved."""
        layers = {n for layer in self.layers for n in (layer.node, *layer.chain)}
        return layers | _inner_sums(self.root) | {self.root}

    @property
    def bias_at(self) -> Layer | None:
        """The layer that takes the unit's bias; None if none can."""
        return next((layer for layer in self.layers if layer.takes_bias), None)


def find_units(module: fx.GraphModule, biases: bool = True) -> list[Unit]:
    """All units of a graph, in the order of their roots; layers that are shared or unknown are left out.

    Args:
        module: The graph.
        biases: Whether layers may get biases that they have not.
    """
    uses = Uses(module)
    found = (find_layer(module, node, uses, biases) for node in module.graph.nodes)
    layers = {layer.end: layer for layer in found if layer is not None}
    units: list[Unit] = []
    placed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if _is_sum(node) and node not in layers and not (len(node.users) == 1 and _is_sum(next(iter(node.users)))):
            leaves = _leaves(node)
            ends = [n for n in leaves if n in layers and len(n.users) == leaves.count(n) == 1]
            mine = _alike([layers[n] for n in ends], node)
            if mine:
                known = [n for n in leaves if all(n is not layer.end for layer in mine)]
                placed.update(layer.end for layer in mine)
                units.append(Unit(node, tuple(mine), tuple(known)))
    units += [Unit(end, (layer,)) for end, layer in layers.items() if end not in placed]
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    return sorted(units, key=lambda unit: order[unit.root])


def first_units(module: fx.GraphModule, units: Sequence[Unit]) -> list[Unit]:
    """Those that read nothing of another unit's."""
    owner = {node: unit for unit in units for node in unit.claimed}
    behind: set[fx.Node] = set()
    for node in module.graph.nodes:
        if any(
            source in behind or owner.get(source, owner.get(node)) is not owner.get(node)
            for source in node.all_input_nodes
        ):
            behind.add(node)
    return [unit for unit in units if not unit.claimed & behind]


def _alike(layers: list[Layer], root: fx.Node) -> list[Layer]:
    """Those that give a value as large as their sum, all with their channels where the first one has them."""
    whole = [layer for layer in layers if shape_of(layer.end) == shape_of(root)]
    return [layer for layer in whole if _channels(layer) == _channels(whole[0])]


def _channels(layer: Layer) -> tuple[object, ...]:
    return layer.contraction.count, layer.contraction.channels, layer.contraction.sizes


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors that are computed from the input."""
    if node.op not in ("call_function", "call_method") or key_of(node.target) != "add" or node.kwargs:
        return False
    return len(node.args) == 2 and all(isinstance(a, fx.Node) and not is_static(a) for a in node.args)


def _leaves(root: fx.Node) -> list[fx.Node]:
    """What a tree of sums adds up."""
    found = []
    for part in root.args:
        assert isinstance(part, fx.Node)
        found += _leaves(part) if _is_sum(part) and len(part.users) == 1 else [part]
    return found


def _inner_sums(root: fx.Node) -> set[fx.Node]:
    """The sums below the root of a tree of sums."""
    found: set[fx.Node] = set()
    for part in root.args if _is_sum(root) else ():
        if isinstance(part, fx.Node) and _is_sum(part) and len(part.users) == 1:
            found |= {part} | _inner_sums(part)
    return found
