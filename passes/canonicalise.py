"""Canonicalise: give every weight that is computed from parameters alone the value that it has.

Weight-standardised convolutions, spectral norm, scaled weights, biases made of parts, tables of position biases
that are looked up, learned queries that a layer projects: whatever depends on parameters and on no input is computed
once, in eval mode, and becomes a parameter of its own. A map between channels then acts on the weights that the network
really uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.graphs import attribute, compute, drop_dead_code, drop_unused, learned
from fxzip.rules import kind_of, target_of


@dataclass(frozen=True, eq=False)
class Fold:
    """How a folded value was computed.

    Attributes:
        what: The node whose value it was.
        shapes: The parameters that it is made of.
        steps: The operations on these, as a graph; None where layers with parameters are among them.
    """

    what: str
    shapes: Mapping[str, torch.Size]
    steps: fx.GraphModule | None

    def run(self, given: Mapping[str, Tensor]) -> Tensor:
        """The value for other parameters.

        Raises:
            TypeError: How it was computed is not known.
        """
        if self.steps is None:
            raise TypeError(f"{self.what} is made by layers")
        found: Tensor = self.steps(*(given[name] for name in self.shapes))
        return found


def canonicalise(module: fx.GraphModule) -> fx.GraphModule:
    """Fold the parts of a traced network that depend on parameters only; the module is changed and returned.

    A folded value takes the name of the one parameter that it was made from, where there is just one that
    nothing else uses; else it is named after its node. ``module.meta["folded"]`` lists the names, and
    ``module.meta["folds"]`` has a `Fold` for each.
    """
    state = {name for name, value in module.state_dict(keep_vars=True).items() if value.is_floating_point()}
    known = _learned(module, state)
    edge = [n for n in known if n.op != "get_attr" and _must_fold(module, n, known)]
    if not edge:
        return module
    values = _evaluate(module, known)
    edge = [node for node in edge if isinstance(values[node], Tensor)]
    folds = [_fold(module, node, known[node]) for node in edge]
    folded = [_replace(module, node, values[node], known[node]) for node in edge]
    module.meta["folded"] = (*module.meta.get("folded", ()), *folded)
    module.meta["folds"] = {**module.meta.get("folds", {}), **dict(zip(folded, folds, strict=True))}
    drop_dead_code(module)
    drop_unused(module, state)
    module.graph.lint()
    module.recompile()
    return module


def _learned(module: fx.GraphModule, state: set[str]) -> dict[fx.Node, frozenset[str]]:
    """The nodes that depend on parameters (or buffers that are saved) and on nothing else, with their names."""
    found = {node: names & state for node, names in learned(module).items()}
    return {node: names for node, names in found.items() if names or node.op == "get_attr"}


def _must_fold(module: fx.GraphModule, node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether the value is used and is more than a parameter moved about: labels follow those by themselves.

    Weights that a layer contracts with must be parameters as they are.
    """
    users = [user for user in node.users if user not in known]
    if not users:
        return False
    pending, moved = [node], True
    while pending and moved:
        source = pending.pop()
        moved = source.op == "get_attr" or kind_of(target_of(module, source)) == "passive"
        pending += source.all_input_nodes
    return not moved or any(kind_of(target_of(module, user)) == "layer" for user in users)


def _evaluate(module: fx.GraphModule, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """The values of nodes that depend on no input, and of what they are made of."""
    needed = set(nodes)
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node in needed:
                values[node] = compute(module, node, values.__getitem__)
    return values


def _fold(module: fx.GraphModule, node: fx.Node, names: frozenset[str]) -> Fold:
    """How a node's value is computed, with the parameters as inputs."""
    shapes = {name: attribute(module, name).shape for name in sorted(names)}
    needed = {node}
    for other in reversed(module.graph.nodes):
        if other in needed:
            needed.update(other.all_input_nodes)
    layers = [module.get_submodule(str(n.target)) for n in needed if n.op == "call_module"]
    if any(next(layer.parameters(), None) is not None for layer in layers):
        return Fold(node.name, shapes, None)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = {name: graph.placeholder(f"x{number}") for number, name in enumerate(shapes)}
    for other in module.graph.nodes:
        if other in needed:
            given = inputs.get(str(other.target)) if other.op == "get_attr" else None
            copies[other] = graph.node_copy(other, copies.__getitem__) if given is None else given
    graph.output(copies[node])
    return Fold(node.name, shapes, fx.GraphModule(module, graph))


def _replace(module: fx.GraphModule, node: fx.Node, value: Tensor, names: frozenset[str]) -> str:
    """Read the value in place of computing it; the name that it got."""
    learns = any(attribute(module, name).requires_grad for name in names)
    target = _new_name(module, node, names, value)
    owner, _, leaf = target.rpartition(".")
    parent = module.get_submodule(owner)
    if hasattr(parent, leaf):
        delattr(parent, leaf)
    if value.is_floating_point():
        parent.register_parameter(leaf, nn.Parameter(value.detach().clone(), requires_grad=learns))
    else:
        parent.register_buffer(leaf, value.detach().clone())
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(target)
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)
    return target


def _new_name(module: fx.GraphModule, node: fx.Node, names: frozenset[str], value: Tensor) -> str:
    """The single parameter's own name if it is free to be taken over; else one made from the node's name.

    A value of another shape (a table that was looked up) never takes it: its channels lie elsewhere.
    """
    weights = [name for name in names if name.rpartition(".")[2] == "weight"] or list(names)
    if len(weights) == 1 and attribute(module, weights[0]).shape == value.shape:
        name = weights[0]
        readers = [n for n in module.graph.find_nodes(op="get_attr") if n.target == name]
        others = {user for n in readers for user in n.users}
        called = {str(n.target) for n in module.graph.find_nodes(op="call_module")}
        if name.rpartition(".")[0] not in called and all(_leads_only_to(user, node) for user in others):
            return name
    return f"{node.name}_folded"


def _leads_only_to(start: fx.Node, end: fx.Node) -> bool:
    pending, seen = [start], set()
    while pending:
        node = pending.pop()
        if node is end or node in seen:
            continue
        seen.add(node)
        if not node.users or node.op == "output":
            return False
        pending += node.users
    return True
