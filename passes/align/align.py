"""The second half of tracing: several models' graphs are walked side by side, up to where they diverge.

Two nodes agree when

1. they are of one kind, and have one target: the same function, method, or kind of module;
2. their modules are configured alike, and their parameters and buffers have the same shapes and dtypes;
   names may differ (``backbone.conv1`` and ``conv1``);
3. constants (integers, flags, buffers that are not in the state dict) have the same values;
4. their arguments are equal, a node's partner standing for the node;
5. a parameter that is used again is used again by all: tied in one model and not in another is a difference.

The walk ends at the first pair that does not agree. The output node is never shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from fxzip.errors import AlignmentError
from fxzip.graphs import attribute, learned, nodes_by_name
from fxzip.passes.align.differences import (
    constant_difference,
    module_difference,
    own_tensors,
    parting_sentence,
    same,
)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where several traced models agree.

    Attributes:
        modules: The models' graphs.
        shared: For each shared node, in graph order, its names, one per model.
        parting: Where and why the models diverge, in a sentence; None where they agree up to the output.
    """

    modules: tuple[fx.GraphModule, ...]
    shared: tuple[tuple[str, ...], ...]
    parting: str | None = None

    @cached_property
    def nodes(self) -> tuple[dict[str, fx.Node], ...]:
        """Each model's nodes by their names."""
        return tuple(nodes_by_name(module) for module in self.modules)

    @cached_property
    def learned(self) -> tuple[frozenset[str], ...]:
        """The nodes of each model that depend on no input: they cross no cut, trunk and heads have each their own."""
        return tuple(frozenset(node.name for node in learned(module)) for module in self.modules)

    def trunk_names(self, model: int) -> tuple[str, ...]:
        """The names of the shared nodes in one model's graph, in graph order."""
        return tuple(names[model] for names in self.shared)

    def peers(self, end: int) -> dict[str, tuple[str, ...]]:
        """For each parameter and buffer of the first model's shared nodes before a place its name in every model."""
        found: dict[str, tuple[str, ...]] = {}
        for names in self.shared[:end]:
            group = [nodes[name] for nodes, name in zip(self.nodes, names, strict=True)]
            targets = [str(node.target) for node in group]
            if group[0].op == "get_attr":
                found[targets[0]] = tuple(targets)
            elif group[0].op == "call_module":
                for key in self.modules[0].get_submodule(targets[0]).state_dict():
                    found[f"{targets[0]}.{key}"] = tuple(f"{target}.{key}" for target in targets)
        return found

    def shared_parameters(self) -> tuple[tuple[str, ...], ...]:
        """The qualified names of the parameters and buffers of the shared nodes, one per model, each once."""
        found: dict[int, tuple[str, ...]] = {}
        for names in self.shared:
            tensors = [
                dict(own_tensors(module, known[name]))
                for module, known, name in zip(self.modules, self.nodes, names, strict=True)
            ]
            for key, tensor in tensors[0].items():
                targets = (str(known[name].target) for known, name in zip(self.nodes, names, strict=True))
                found.setdefault(id(tensor), tuple(f"{t}.{key}" if key else t for t in targets))
        return tuple(found.values())


def align(graph_modules: Sequence[fx.GraphModule]) -> Alignment:
    """Walks the graphs side by side.

    Raises:
        AlignmentError: There are no graphs. (That nothing is shared is for the caller to judge.)
    """
    if not graph_modules:
        raise AlignmentError("there is no model to align")
    first, *others = graph_modules
    pairs = [_Pair(first, other) for other in others]
    shared: list[tuple[str, ...]] = []
    columns = [list(module.graph.nodes) for module in graph_modules]
    for row in zip(*columns, strict=False):
        node, *peers = row
        differences = [pair.difference(node, peer) for pair, peer in zip(pairs, peers, strict=True)]
        for number, (peer, difference) in enumerate(zip(peers, differences, strict=True), start=1):
            if difference:
                parting = parting_sentence(graph_modules, number, node, peer, difference)
                return Alignment(tuple(graph_modules), tuple(shared), parting)
        if node.op == "output":
            break
        for pair, peer in zip(pairs, peers, strict=True):
            pair.accept(node, peer)
        shared.append(tuple(n.name for n in row))
    return Alignment(tuple(graph_modules), tuple(shared))


class _Pair:
    """Two graphs, and what of them is known to correspond."""

    def __init__(self, left: fx.GraphModule, right: fx.GraphModule) -> None:
        self._left, self._right = left, right
        self._nodes: dict[fx.Node, fx.Node] = {}
        self._forth: dict[int, int] = {}
        self._back: dict[int, int] = {}

    def difference(self, left: fx.Node, right: fx.Node) -> str | None:
        """Why the nodes do not agree, or None."""
        if left.op != right.op:
            return "they are of different kinds"
        if left.op in {"call_function", "call_method"} and left.target != right.target:
            return "they call different functions or modules"
        reason = None
        if left.op == "call_module":
            reason = module_difference(
                attribute(self._left, str(left.target)), attribute(self._right, str(right.target))
            )
        elif left.op == "get_attr":
            reason = constant_difference(self._left, left, self._right, right)
        if reason is None and left.op != "placeholder":
            reason = self._arguments("arguments", (left.args, left.kwargs), (right.args, right.kwargs))
        return reason or self._tie_difference(left, right)

    def accept(self, left: fx.Node, right: fx.Node) -> None:
        """Takes the nodes, and their parameters and buffers, for partners from now on."""
        self._nodes[left] = right
        theirs = dict(own_tensors(self._right, right))
        for key, tensor in own_tensors(self._left, left):
            self._forth[id(tensor)] = id(theirs[key])
            self._back[id(theirs[key])] = id(tensor)

    def _tie_difference(self, left: fx.Node, right: fx.Node) -> str | None:
        theirs = dict(own_tensors(self._right, right))
        for key, tensor in own_tensors(self._left, left):
            peer = theirs[key]
            if self._forth.get(id(tensor), id(peer)) != id(peer) or self._back.get(id(peer), id(tensor)) != id(tensor):
                return f"{key or left.target} is used at several nodes (tied) in one of them only"
        return None

    def _arguments(self, what: str, left: Any, right: Any) -> str | None:
        """Why two arguments differ, or None."""
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            partners = isinstance(left, fx.Node) and self._nodes.get(left) is right
            return None if partners else f"their {what} come from different nodes"
        if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
            if len(left) != len(right):
                return f"they have {len(left)} and {len(right)} {what}"
            return _first(self._arguments(what, a, b) for a, b in zip(left, right, strict=True))
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            if left.keys() != right.keys():
                return f"they have the {what} {sorted(map(str, left))} and {sorted(map(str, right))}"
            return _first(self._arguments(f"argument {key}", left[key], right[key]) for key in left)
        if isinstance(left, slice) and isinstance(right, slice):
            parts = zip((left.start, left.stop, left.step), (right.start, right.stop, right.step), strict=True)
            return _first(self._arguments(what, a, b) for a, b in parts)
        return None if same(left, right) else f"their {what} are {left!r} and {right!r}"


def _first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
