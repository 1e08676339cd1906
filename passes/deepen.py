"""The deepen pass: networks that differ by residual blocks get the same ones.

A residual block that one network has and another lacks (ResNet-34 beside ResNet-18, a ViT of 8 beside one of 6 blocks)
is the identity in the latter: with weights of zero its branch adds nothing. So the shallow network gets the deep one's
graph, with its own weights where it has the block and zeros where it does not. It computes what it did, which is
checked, and from then on both are networks of one architecture.

1. `residual_blocks` finds what can be left out of a graph: the nodes between a value and its sum with what they make of
   it, and a ReLU behind the sum.
2. The shallow network's nodes are matched with the deep one's, in order, so that what is left over are such blocks. Of
   several ways the one is taken that leaves blocks where they were by their share of the depth.
3. The graph is put together from both: calls as the deep network wires them, with the shallow one's modules and
   numbers. A block that is added has the shape of one that the shallow network has, if it has one like it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.data.batches import Inputs, with_batch_size
from fxzip.graphs import attribute, bind_inputs, free_name, is_relu, is_static
from fxzip.passes.verify.precision import own_precision
from fxzip.passes.verify.reference import error_of, run
from fxzip.rules.calls import shape_of
from fxzip.rules.keys import key_of

_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "output_size", "ceil_mode")
"""Settings of modules by which they are told apart, beside their kind; none of them is a number of channels."""


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """A part of a graph that gives what it takes, if its weights are zeros.

    Attributes:
        source: What it takes; it may lie far in front.
        nodes: Its nodes, one behind the other in the graph; the last one gives the result.
        start: The place of the first.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    start: int


def deepen(graphs: Sequence[fx.GraphModule], example: Inputs) -> list[fx.GraphModule]:
    """The graphs, those of shallow networks with blocks that do nothing where the deepest one has more.

    A network that differs by other things than residual blocks stays as it is, as does one for which
    the result does not compute what it does.

    Args:
        graphs: Traced networks; they are left as they are.
        example: Inputs of each of them.
    """
    deepest = max(graphs, key=lambda graph: len(graph.graph.nodes))
    return [graph if len(graph.graph.nodes) == len(deepest.graph.nodes) else _deepened(deepest, graph, example)
            for graph in graphs]  # fmt: skip


def _deepened(deep: fx.GraphModule, shallow: fx.GraphModule, example: Inputs) -> fx.GraphModule:
    matched = _matched(deep, shallow)
    if matched is None:
        return shallow
    partners, added = matched
    try:
        found = _Builder(deep, shallow, partners, added).build()
        if not any(parameter.is_meta for parameter in shallow.parameters()):
            inputs = tuple(bind_inputs(shallow, *with_batch_size(*example, 2)).values())
            if not error_of(run(shallow, inputs), run(found, inputs)) <= own_precision(shallow).tolerance:
                return shallow
    except (_OtherStructure, RuntimeError, TypeError, ValueError):
        return shallow
    return found


def residual_blocks(module: fx.GraphModule) -> Iterator[ResidualBlock]:
    """The blocks that can be left out of a graph, in the order of their sums."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if node.op not in ("call_function", "call_method") or key_of(node.target) not in ("add", "add_"):
            continue
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(operands) != 2:
            continue
        for source, branch in (operands, operands[::-1]):
            inside = _between(source, branch, order)
            if inside is None:
                continue
            ends = [node]
            users = list(node.users)
            if len(users) == 1 and is_relu(module, users[0]):
                ends.append(users[0])
            nodes = sorted(inside | set(ends), key=order.__getitem__)
            whole = order[nodes[-1]] - order[nodes[0]] == len(nodes) - 1
            closed = all(user in inside or user is node for each in inside for user in each.users)
            closed = closed and not any(_reads_beside(each, inside | {source}) for each in inside)
            if whole and closed:
                yield ResidualBlock(source, tuple(nodes), order[nodes[0]])


def _reads_beside(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a node reads values that are computed elsewhere; parameters and sizes are none."""
    others = (source for source in node.all_input_nodes if source not in known and not is_static(source))
    return any(isinstance(source.meta.get("val"), Tensor) for source in others)


def _between(source: fx.Node, branch: fx.Node, order: Mapping[fx.Node, int]) -> set[fx.Node] | None:
    """The nodes behind ``source`` from which ``branch`` is computed; None where it is not computed from ``source``."""
    inside: set[fx.Node] = set()
    pending, reached = [branch], False
    while pending:
        node = pending.pop()
        reached = reached or node is source
        if node in inside or order[node] <= order[source] or node.op == "placeholder":
            continue
        inside.add(node)
        pending += node.all_input_nodes
    return inside if reached and inside else None


_Step = tuple[float, ResidualBlock | None]
"""The least cost to come to a pair of places, and the block that was left out to come there; None: a pair of nodes."""


def _matched(
    deep: fx.GraphModule, shallow: fx.GraphModule
) -> tuple[dict[fx.Node, fx.Node], list[ResidualBlock]] | None:
    """The shallow network's node for each of the deep one's, and the blocks that are left over; None if others are."""
    ours, theirs = list(deep.graph.nodes), list(shallow.graph.nodes)
    reached = _reached(deep, shallow)
    place, other = len(ours), len(theirs)
    if other not in reached[place]:
        return None
    partners: dict[fx.Node, fx.Node] = {}
    added: list[ResidualBlock] = []
    while place:
        block = reached[place][other][1]
        if block is None:
            place, other = place - 1, other - 1
            partners[ours[place]] = theirs[other]
        else:
            place -= len(block.nodes)
            added.append(block)
    return partners, added


def _reached(deep: fx.GraphModule, shallow: fx.GraphModule) -> list[dict[int, _Step]]:
    """How to go through both graphs at once, by the numbers of nodes behind one in the deep and the shallow one.

    A pair of nodes costs how far apart they lie, as shares of the depth; a block that is left out costs nothing.
    """
    kinds, wanted = ([_kind(module, node) for node in module.graph.nodes] for module in (deep, shallow))
    starting: dict[int, list[ResidualBlock]] = {}
    for block in residual_blocks(deep):
        starting.setdefault(block.start, []).append(block)
    reached: list[dict[int, _Step]] = [{} for _ in range(len(kinds) + 1)]
    reached[0][0] = 0.0, None

    def take(place: int, other: int, cost: float, block: ResidualBlock | None) -> None:
        if other not in reached[place] or cost < reached[place][other][0]:
            reached[place][other] = cost, block

    for place, kind in enumerate(kinds):
        for other, (cost, _) in reached[place].items():
            for block in starting.get(place, ()):
                take(place + len(block.nodes), other, cost, block)
            if other < len(wanted) and kind == wanted[other]:
                take(place + 1, other + 1, cost + abs(place / len(kinds) - other / len(wanted)), None)
    return reached


def _kind(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    """What a node does, whatever its sizes are."""
    if node.op == "call_module":
        owner: nn.Module = attribute(module, str(node.target))
        return node.op, type(owner), *(str(getattr(owner, name, None)) for name in _SETTINGS)
    if node.op == "get_attr":
        value = attribute(module, str(node.target))
        return node.op, isinstance(value, nn.Parameter), value.dim() if isinstance(value, Tensor) else None
    return node.op, node.target if node.op.startswith("call") else None, len(node.all_input_nodes)


class _OtherStructure(Exception):
    """Arguments of two nodes do not correspond."""


class _Builder:
    """Puts the shallow network together anew, in the deep one's graph."""

    def __init__(
        self, deep: fx.GraphModule, shallow: fx.GraphModule, partners: Mapping[fx.Node, fx.Node],
        added: Sequence[ResidualBlock],
    ) -> None:  # fmt: skip
        self.deep, self.partners, self.blocks = deep, partners, list(residual_blocks(deep))
        self.result = copy.deepcopy(shallow)
        self.owner = {node: block for block in added for node in block.nodes}
        self.templates = {block: self._template(block) for block in added}
        self.made: dict[fx.Node, fx.Node] = {}
        self.targets: dict[tuple[ResidualBlock, str], str] = {}
        self.graph = fx.Graph()

    def build(self) -> fx.GraphModule:
        """The network.

        Raises:
            _OtherStructure: Arguments do not correspond.
        """
        for node in self.deep.graph.nodes:
            block = self.owner.get(node)
            own = self.partners.get(node, node) if block is None else self.templates[block].get(node, node)
            target = own.target if block is None else self._zeros(block, node, own)
            args, kwargs = self._mixed(node.args, own.args), self._mixed(node.kwargs, own.kwargs)
            self.made[node] = self.graph.create_node(own.op, target, args, kwargs, name=own.name, type_expr=own.type)
            self.made[node].meta = copy.copy(own.meta)
        self.graph.set_codegen(copy.deepcopy(self.result.graph._codegen))
        self.result.graph = self.graph
        self.result.graph.lint()
        return self.result

    def _template(self, block: ResidualBlock) -> dict[fx.Node, fx.Node]:
        """The nodes of a block that the shallow network has, and that is like this one; none where it has no such."""
        kinds = [_kind(self.deep, node) for node in block.nodes]
        others = [b for b in self.blocks if all(node in self.partners for node in b.nodes)]
        alike = [b for b in others if [_kind(self.deep, node) for node in b.nodes] == kinds]
        alike = [b for b in alike if shape_of(b.source) == shape_of(block.source)]
        if not alike:
            return {}
        nearest = min(alike, key=lambda b: abs(b.start - block.start))
        return {mine: self.partners[other] for mine, other in zip(block.nodes, nearest.nodes, strict=True)}

    def _zeros(self, block: ResidualBlock, node: fx.Node, own: fx.Node) -> Any:
        """What an added node calls: a module or parameter like the template's, of zeros."""
        if node.op not in ("call_module", "get_attr"):
            return own.target
        key = block, str(own.target)
        if key not in self.targets:
            root = self.deep if own is node else self.result
            value = copy.deepcopy(attribute(root, str(own.target)))
            name = free_name(f"added_{str(own.target).replace('.', '_')}", dir(self.result))
            with torch.no_grad():
                for parameter in value.parameters() if isinstance(value, nn.Module) else [value]:
                    if isinstance(parameter, nn.Parameter):
                        parameter.zero_()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.result.register_buffer(name, value)
            else:
                setattr(self.result, name, value)
            self.targets[key] = name
        return self.targets[key]

    def _mixed(self, ours: Any, theirs: Any) -> Any:
        """Arguments with the deep network's wires and the shallow one's numbers."""
        if isinstance(ours, fx.Node) != isinstance(theirs, fx.Node):
            raise _OtherStructure
        if isinstance(ours, fx.Node):
            return self.made[ours]
        if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
            if len(ours) != len(theirs):
                raise _OtherStructure
            return type(ours)([self._mixed(a, b) for a, b in zip(ours, theirs, strict=True)])
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            if ours.keys() != theirs.keys():
                raise _OtherStructure
            return {key: self._mixed(value, theirs[key]) for key, value in ours.items()}
        if isinstance(ours, slice) and isinstance(theirs, slice):
            parts = zip((ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), strict=True)
            return slice(*(self._mixed(a, b) for a, b in parts))
        return theirs
