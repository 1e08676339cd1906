"""The second half of tracing: several models' graphs are walked side by side, up to where they part.

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

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.errors import AlignmentError
from fxzip.graphs import attribute, learned, nodes_by_name

# What a module is set to but its output in eval mode does not hang on.
_NO_MATTER = {"training", "inplace", "momentum", "forward"}


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where several traced models agree.

    Attributes:
        modules: The models' graphs.
        shared: For each shared node, in graph order, its names, one per model.
        parting: Where and why the models part, in a sentence; None where they agree up to the output.
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
                dict(_tensors(module, known[name]))
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
                parting = _parting(graph_modules, number, node, peer, difference)
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
            return "they call different things"
        reason = None
        if left.op == "call_module":
            reason = _module_difference(
                attribute(self._left, str(left.target)), attribute(self._right, str(right.target))
            )
        elif left.op == "get_attr":
            reason = _constant_difference(self._left, left, self._right, right)
        if reason is None and left.op != "placeholder":
            reason = self._arguments("arguments", (left.args, left.kwargs), (right.args, right.kwargs))
        return reason or self._tie_difference(left, right)

    def accept(self, left: fx.Node, right: fx.Node) -> None:
        """Takes the nodes, and their parameters and buffers, for partners from now on."""
        self._nodes[left] = right
        theirs = dict(_tensors(self._right, right))
        for key, tensor in _tensors(self._left, left):
            self._forth[id(tensor)] = id(theirs[key])
            self._back[id(theirs[key])] = id(tensor)

    def _tie_difference(self, left: fx.Node, right: fx.Node) -> str | None:
        theirs = dict(_tensors(self._right, right))
        for key, tensor in _tensors(self._left, left):
            peer = theirs[key]
            if self._forth.get(id(tensor), id(peer)) != id(peer) or self._back.get(id(peer), id(tensor)) != id(tensor):
                return f"{key or left.target} is used at several nodes (tied) in one of them only"
        return None

    def _arguments(self, what: str, left: Any, right: Any) -> str | None:
        """Why two arguments differ, or None."""
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            same = isinstance(left, fx.Node) and self._nodes.get(left) is right
            return None if same else f"their {what} come from different nodes"
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
        return None if _same(left, right) else f"their {what} are {left!r} and {right!r}"


def _first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _same(left: Any, right: Any) -> bool:
    """Whether two plain values are equal; a device is where a model happens to be."""
    if isinstance(left, torch.device) and isinstance(right, torch.device):
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and left != left:
        return bool(right != right)
    return bool(left == right)


def _tensors(module: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    """A node's own parameters and buffers, by their names inside its module ("" for a get_attr node)."""
    if node.op == "get_attr":
        yield "", attribute(module, str(node.target))
    elif node.op == "call_module":
        owner: nn.Module = attribute(module, str(node.target))
        yield from owner.named_parameters(remove_duplicate=False)
        yield from owner.named_buffers(remove_duplicate=False)


def _module_difference(left: nn.Module, right: nn.Module) -> str | None:
    if type(left) is not type(right):
        return "they are different kinds of module"
    ours, theirs = dict(_settings(left)), dict(_settings(right))
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or not _same_setting(ours[key], theirs[key]):
            return f"{key} is {_word(ours.get(key))} in one and {_word(theirs.get(key))} in the other"
    return _tensors_difference(_own(left), _own(right))


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _tensors_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> str | None:
    if left.keys() != right.keys():
        return f"only one of them has {', '.join(sorted(left.keys() ^ right.keys()))}"
    for key, tensor in left.items():
        reason = _tensor_difference(tensor, right[key])
        if reason:
            return f"{key} {reason}".strip()
    return None


def _tensor_difference(left: Tensor, right: Tensor) -> str | None:
    if left.shape != right.shape:
        return f"has shape {tuple(left.shape)} in one and {tuple(right.shape)} in the other"
    if left.dtype != right.dtype:
        return f"is {left.dtype} in one and {right.dtype} in the other"
    return None


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's plain public attributes, and those of its parts: strides, epsilons, activations by name."""
    for prefix, part in module.named_modules():
        yield f"{prefix}.type" if prefix else "type", type(part)
        for key, value in part.__dict__.items():
            if not key.startswith("_") and key not in _NO_MATTER and not isinstance(value, (Tensor, nn.Module)):
                yield f"{prefix}.{key}" if prefix else key, value


def _same_setting(left: Any, right: Any) -> bool:
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(_same_setting(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, types.FunctionType) and isinstance(right, types.FunctionType):
        return left.__qualname__ == right.__qualname__ and left.__module__ == right.__module__
    plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, type)
    if isinstance(left, plain) or isinstance(right, plain):
        return _same(left, right)
    return type(left) is type(right)  # nothing that shapes an output of torch.nn's modules


def _word(value: Any) -> str:
    return value.__name__ if isinstance(value, (type, types.FunctionType)) else repr(value)


def _constant_difference(
    left: fx.GraphModule, left_node: fx.Node, right: fx.GraphModule, right_node: fx.Node
) -> str | None:
    """Shape and dtype; and the values, where they are no parameters but settings."""
    ours, theirs = attribute(left, str(left_node.target)), attribute(right, str(right_node.target))
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return None if _same(ours, theirs) else "their values differ"
    if isinstance(ours, nn.Parameter) != isinstance(theirs, nn.Parameter):
        return "one is a parameter and the other is not"
    reason = _tensor_difference(ours, theirs)
    if reason:
        return f"it {reason}"
    fixed = not ours.is_floating_point() or _is_transient(left, left_node) or _is_transient(right, right_node)
    if fixed and not isinstance(ours, nn.Parameter) and not ours.is_meta and not theirs.is_meta:
        return None if torch.equal(ours.cpu(), theirs.cpu()) else "their values, which are constants, differ"
    return None


def _is_transient(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a tensor is not part of the state dict: made from settings, not learnt."""
    path, _, name = str(node.target).rpartition(".")
    return name not in module.get_submodule(path)._parameters and name in (
        module.get_submodule(path)._non_persistent_buffers_set
    )


# ---- the sentence


def _parting(modules: Sequence[fx.GraphModule], number: int, left: fx.Node, right: fx.Node, reason: str) -> str:
    return (
        f"model 0 and model {number} part at {_describe(modules[0], left)} and "
        f"{_describe(modules[number], right)}: {reason}"
    )


def _describe(module: fx.GraphModule, node: fx.Node) -> str:
    """``fc (Linear, weight 10 x 512, bias 10)``."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"the input {node.target}"
    kind = node.op
    if node.op == "call_module":
        kind = type(attribute(module, str(node.target))).__name__
    elif node.op == "call_function":
        kind = getattr(node.target, "__name__", str(node.target))
    elif node.op == "call_method":
        kind = f".{node.target}()"
    shapes = [f"{key} {_shape(tensor)}".strip() for key, tensor in _tensors(module, node)]
    name = str(node.target) if node.op in {"call_module", "get_attr"} else node.name
    value = node.meta.get("val")
    gives = [f"output {_shape(value)}"] if isinstance(value, Tensor) and not shapes else []
    return f"{name} ({', '.join([kind, *shapes, *gives])})"


def _shape(tensor: Tensor) -> str:
    return " x ".join("batch" if isinstance(n, torch.SymInt) else str(n) for n in tensor.shape) or "scalar"
