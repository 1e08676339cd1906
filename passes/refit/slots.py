"""The parameters and settings of a node by name, whether it calls a module or a function with get_attr nodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.graphs import new_parameter, parameter_uses, static_value
from fxzip.passes.recalibrate import BATCH_NORMS
from fxzip.rules.registry import key_of

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

# How the functions, methods and ATen operators of each name call their arguments, by place. What `addmm` adds to
# its product is called the bias here.
_ARGUMENTS: dict[object, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "weight", "bias", "running_mean", "running_var"),
}
_ARGUMENTS |= {f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)}
_ARGUMENTS |= {f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)}

# Those that differ from what else has their name in the order.
_EXACTLY = {**BATCH_NORMS, F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias")}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function's or method's node by name; empty where the names are not known."""
    names = _names(node)
    return dict(zip(names, node.args, strict=False)) | node.kwargs if names else {}


def _names(node: fx.Node) -> tuple[str, ...]:
    if node.op == "call_function" and node.target in _EXACTLY:
        return _EXACTLY[node.target]
    return _ARGUMENTS.get(key_of(node.target), ()) if node.op in ("call_function", "call_method") else ()


def slot(module: nn.Module, node: fx.Node, name: str) -> Tensor | None:
    """A node's parameter or buffer of that name; None if it has none."""
    if node.op == "call_module":
        value = getattr(module.get_submodule(str(node.target)), name, None)
        return value.detach() if isinstance(value, Tensor) else None
    return static_value(module, arguments(node).get(name))


def takes(module: nn.Module, node: fx.Node, name: str) -> bool:
    """Whether a node can have a parameter of that name, though it may have none."""
    if node.op == "call_module":
        return name in module.get_submodule(str(node.target))._parameters
    return name in _names(node)


def fill(module: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    """Give a node a parameter of its own of that name; others that shared the old one keep that."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        setattr(target, name, nn.Parameter(value, requires_grad=False))
        for flag in ("affine", "elementwise_affine"):
            if hasattr(target, flag):
                setattr(target, flag, True)
        return
    place = _names(node).index(name)
    source = new_parameter(module, node, name, value)
    if place < len(node.args):
        node.update_arg(place, source)
    else:
        node.update_kwarg(name, source)


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
