"""The units that refit solves: layers with what is linear behind them, up to where targets are taken."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.passes._clean import attribute
from fxzip.passes.untie import parameter_uses
from fxzip.rules.registry import key_of

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer that can be solved for.

    Attributes:
        node: Its node.
        weight: Qualified name of the weight.
        geometry: Stride, padding and dilation of a convolution; None for a linear layer.
        groups: Groups of a convolution.
        chain: The nodes after it that act on each channel as a line does (BatchNorm, layer scale), to fold.
    """

    node: fx.Node
    weight: str
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    groups: int
    chain: tuple[fx.Node, ...] = ()

    @property
    def source(self) -> fx.Node:
        """Where its input comes from."""
        return self.node.all_input_nodes[0]

    @property
    def end(self) -> fx.Node:
        """The last node of the chain."""
        return self.chain[-1] if self.chain else self.node


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
        return {n for layer in self.layers for n in (layer.node, *layer.chain)}


def find_units(module: fx.GraphModule) -> list[Unit]:
    """All units of a graph, in the order of their roots; layers that are shared or unknown are left out."""
    uses = _uses(module)
    layers = {}
    for node in module.graph.nodes:
        layer = _layer(module, node, uses)
        if layer is not None:
            layers[layer.end] = layer
    units: list[Unit] = []
    placed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if is_sum(node) and not (len(node.users) == 1 and is_sum(next(iter(node.users)))):
            leaves = _leaves(node)
            free = [layers[n] for n in leaves if n in layers and len(n.users) == 1]
            mine = [layer for layer in free if layer.groups == free[0].groups]
            if mine:
                known = [n for n in leaves if all(n is not layer.end for layer in mine)]
                placed.update(layer.end for layer in mine)
                units.append(Unit(node, tuple(mine), tuple(known)))
    units += [Unit(end, (layer,)) for end, layer in layers.items() if end not in placed]
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    return sorted(units, key=lambda unit: order[unit.root])


def _uses(module: fx.GraphModule) -> Counter[str]:
    """How many nodes use each module or parameter, or one that is tied to it."""
    of = parameter_uses(module, module.graph.nodes)
    uses = Counter(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    for name in uses:
        tied = [of[id(p)] for p in module.get_submodule(name).parameters()]
        uses[name] = max([uses[name], *tied])
    for node in module.graph.find_nodes(op="get_attr"):
        uses[str(node.target)] = of[id(attribute(module, str(node.target)))]
    return uses


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of the graph."""
    if node.op not in ("call_function", "call_method") or key_of(node.target) != "add" or node.kwargs:
        return False
    return len(node.args) == 2 and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args)


def _leaves(root: fx.Node) -> list[fx.Node]:
    """What a tree of sums adds up."""
    found = []
    for part in root.args:
        assert isinstance(part, fx.Node)
        found += _leaves(part) if is_sum(part) and len(part.users) == 1 else [part]
    return found


def inner_sums(root: fx.Node) -> set[fx.Node]:
    """The sums below the root of a tree of sums."""
    found: set[fx.Node] = set()
    for part in root.args if is_sum(root) else ():
        if isinstance(part, fx.Node) and is_sum(part) and len(part.users) == 1:
            found |= {part} | inner_sums(part)
    return found


def _layer(module: fx.GraphModule, node: fx.Node, uses: Counter[str]) -> Layer | None:
    if node.op == "call_module" and uses[str(node.target)] == 1:
        target = module.get_submodule(str(node.target))
        weight = f"{node.target}.weight"
        if isinstance(target, nn.Linear):
            return Layer(node, weight, None, 1, _chain(module, node, uses))
        if isinstance(target, nn.Conv2d) and target.padding_mode == "zeros" and not isinstance(target.padding, str):
            geometry: Any = (target.stride, target.padding, target.dilation)
            return Layer(node, weight, geometry, target.groups, _chain(module, node, uses))
    if node.op == "call_function" and node.target in (F.linear, F.conv2d, torch.conv2d):
        return _functional_layer(module, node, uses)
    return None


def _functional_layer(module: fx.GraphModule, node: fx.Node, uses: Counter[str]) -> Layer | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight = given["weight"]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or uses[str(weight.target)] != 1:
        return None
    if not isinstance(attribute(module, str(weight.target)), nn.Parameter):
        return None  # the matrix of an unmerge, which no parent has
    if node.target is F.linear:
        return Layer(node, str(weight.target), None, 1, _chain(module, node, uses))
    if isinstance(given.get("padding"), str):
        return None
    pairs: Any = tuple(_pair(given.get(k, d)) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return Layer(node, str(weight.target), pairs, int(str(given.get("groups", 1))), _chain(module, node, uses))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _chain(module: fx.GraphModule, node: fx.Node, uses: Counter[str]) -> tuple[fx.Node, ...]:
    """The BatchNorms and scales that follow a layer and nothing else uses."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        if scale_and_shift_of(module, user) is None or user.all_input_nodes[0] is not node:
            break
        if user.op == "call_module" and uses[str(user.target)] != 1:
            break
        found.append(user)
        node = user
    return tuple(found)


def scale_and_shift_of(module: nn.Module, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The line y = a x + b that a BatchNorm is in eval mode, or a product with a parameter; None for the rest."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if isinstance(target, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and target.running_var is not None:
            assert target.running_mean is not None
            return _line(target.running_mean, target.running_var, target.weight, target.bias, target.eps)
    if node.op == "call_function" and node.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if given.get("running_mean") is None or given.get("training"):
            return None
        tensors = [_tensor(module, given.get(k)) for k in ("running_mean", "running_var", "weight", "bias")]
        assert tensors[0] is not None
        assert tensors[1] is not None
        return _line(tensors[0], tensors[1], tensors[2], tensors[3], float(str(given.get("eps", 1e-5))))
    return _scale(module, node)


def _scale(module: nn.Module, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    if node.op != "call_function" or node.target not in (operator.mul, torch.mul) or len(node.args) != 2:
        return None
    x, factor = node.args
    if not (isinstance(x, fx.Node) and isinstance(factor, fx.Node)) or x.op == "get_attr" or factor.op != "get_attr":
        return None
    tensor = _tensor(module, factor)
    if tensor is None or tensor.numel() != max(tensor.shape, default=1):
        return None
    return tensor.detach().reshape(-1), torch.zeros_like(tensor).reshape(-1)


def _tensor(module: nn.Module, node: Any) -> Tensor | None:
    """The tensor that a get_attr node reads; None for an argument that is no node."""
    value = attribute(module, str(node.target)) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _line(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    scale = (var.double() + eps).rsqrt() * (1 if weight is None else weight.detach().double())
    return scale, (0 if bias is None else bias.detach().double()) - mean.double() * scale


def is_norm(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a normalisation module with an affine part that is used once."""
    if node.op != "call_module" or sum(n.target == node.target for n in node.graph.nodes) > 1:
        return False
    target = module.get_submodule(str(node.target))
    return isinstance(target, _NORMS) and getattr(target, "weight", None) is not None
