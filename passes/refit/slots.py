"""The parameters and settings of a node by name, whether it calls a module or a function with get_attr nodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, fx, nn

from fxzip.graphs import named_call, new_parameter, parameter_uses, static_value

_OWN = "fxzip_own"
"""Key in the meta of get_attr nodes whose parameters were made for one node; what it is called."""


def slot(module: nn.Module, node: fx.Node, name: str) -> Tensor | None:
    """A node's parameter or buffer of that name; None if it has none."""
    call = named_call(module, node)
    value = None if call is None else call.arguments.get(name)
    return value.detach() if isinstance(value, Tensor) else static_value(module, value)


def fill(module: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    """Give a node a parameter of its own of that name; others that shared the old one keep that."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        setattr(target, name, nn.Parameter(value, requires_grad=False))
        for flag in ("affine", "elementwise_affine"):
            if hasattr(target, flag):
                setattr(target, flag, True)
        return
    call = named_call(module, node)
    assert call is not None
    place = call.names.index(name)
    source = own_parameter(module, node, name, value, call.arguments.get(name))
    if place < len(node.args):
        node.update_arg(place, source)
    else:
        node.update_kwarg(name, source)


def empty(module: fx.GraphModule, node: fx.Node, name: str) -> None:
    """Take a node's parameter of that name away, which it can do without."""
    if node.op == "call_module":
        module.get_submodule(str(node.target)).register_parameter(name, None)
        return
    call = named_call(module, node)
    assert call is not None
    place = call.names.index(name)
    if place < len(node.args):
        node.update_arg(place, None)
    else:
        node.update_kwarg(name, None)


def own_parameter(module: fx.GraphModule, node: fx.Node, name: str, value: Tensor, given: Any) -> fx.Node:
    """A parameter that only this node uses: what it was given, if that was made here, with a new value; or a new one.

    Layers are filled again at each step of a fit.
    """
    if isinstance(given, fx.Node) and _OWN in given.meta:
        module.get_parameter(str(given.target)).copy_(value)
        return given
    source = new_parameter(module, node, name, value)
    source.meta[_OWN] = node.name
    return source


class Uses:
    """How many nodes of a graph use each module and each parameter; tied ones count together."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._parameters = parameter_uses(module, module.graph.nodes)
        calls = module.graph.find_nodes(op="call_module")
        self._modules = Counter(id(module.get_submodule(str(node.target))) for node in calls)

    def alone(self, node: fx.Node) -> bool:
        """Whether nothing else uses the module that a node calls, or its parameters; true for functions."""
        if node.op != "call_module":
            return True
        target = self.module.get_submodule(str(node.target))
        return self._modules[id(target)] == 1 and all(self._parameters[id(p)] == 1 for p in target.parameters())

    def once(self, parameter: Tensor) -> bool:
        """Whether a parameter is used at one node only."""
        return self._parameters[id(parameter)] == 1
