"""Operations that act on each element as a line does, y = a x + b: what refit can fold into the layer before."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxzip.graphs import is_static, static_value
from fxzip.passes.recalibrate import BATCH_NORMS, TRIPLES
from fxzip.passes.refit.slots import arguments, slot
from fxzip.rules.registry import key_of

_OPERATIONS: dict[object, Callable[[Any, Any], Any]] = {"mul": operator.mul, "add": operator.add, "sub": operator.sub}
_OPERATIONS |= {"div": operator.truediv, "truediv": operator.truediv}


def line_of(module: nn.Module, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Slope and offset of a node in one of its inputs, float64, as tensors that broadcast with its value.

    None where it is no line: all but BatchNorms with running statistics, and sums and products with a number or
    with a parameter.
    """
    return _batch_norm(module, node, x) if is_batch_norm(module, node) else _with_constant(module, node, x)


def is_batch_norm(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a BatchNorm, as a module or as a function that gives one tensor."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), _BatchNorm)
    return node.op == "call_function" and node.target in BATCH_NORMS and node.target not in TRIPLES


def rank_of(node: Any) -> int | None:
    """The number of axes of a node's value, as it was traced; None if that is not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _batch_norm(module: nn.Module, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
    given: Any = vars(module.get_submodule(str(node.target))) if node.op == "call_module" else arguments(node)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (None if t is None else t.double() for t in (slot(module, node, k) for k in names))
    rank = rank_of(node)
    if mean is None or var is None or rank is None or given.get("training") or node.all_input_nodes[0] is not x:
        return None
    slope = (var + given.get("eps", 1e-5)).rsqrt() * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - mean * slope
    shape = (-1,) + (1,) * (rank - 2)
    return slope.reshape(shape), offset.reshape(shape)


def _with_constant(module: nn.Module, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
    function = _OPERATIONS.get(key_of(node.target)) if node.op in ("call_function", "call_method") else None
    if function is None or len(node.args) != 2 or node.kwargs or is_static(x):
        return None
    first = node.args[0] is x
    other = node.args[1] if first else node.args[0]
    constant = static_value(module, other) if isinstance(other, fx.Node) else other
    if not isinstance(constant, (int, float, Tensor)) or (not first and function in (operator.truediv, operator.sub)):
        return None
    constant = torch.as_tensor(constant).double()
    if rank_of(node) is None or constant.dim() > (rank_of(x) or 0):
        return None  # it adds axes to the value
    zero = torch.zeros_like(constant)
    offset = function(zero, constant)
    return function(zero + 1, constant) - offset, offset
