"""Operations that act on each element as a line does, y = a x + b: what refit can fold into the layer before."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.graphs import is_static, named_call, norm_of, static_value
from fxzip.passes.refit.slots import slot
from fxzip.rules.calls import rank_of
from fxzip.rules.keys import key_of

_OPERATIONS: dict[object, Callable[[Any, Any], Any]] = {"mul": operator.mul, "add": operator.add, "sub": operator.sub}
_OPERATIONS |= {"div": operator.truediv, "truediv": operator.truediv}


def line_of(module: nn.Module, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Slope and offset of a node in one of its inputs, float64, as tensors that broadcast with its value.

    None where it is no line: all but BatchNorms with running statistics, and sums and products with a number or
    with a parameter.
    """
    norm = norm_of(module, node)
    if norm is None:
        return _with_constant(module, node, x)
    return _normed(module, node, x, norm.axis) if norm.statistics and not norm.several else None


def _normed(module: nn.Module, node: fx.Node, x: fx.Node, axis: int) -> tuple[Tensor, Tensor] | None:
    call, rank = named_call(module, node), rank_of(node)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (None if t is None else t.double() for t in (slot(module, node, k) for k in names))
    if call is None or mean is None or var is None or rank is None or call.source("input") is not x:
        return None
    if call.arguments.get("training"):
        return None
    slope = (var + call.arguments.get("eps", 1e-5)).rsqrt() * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - mean * slope
    shape = [-1 if a == axis % rank else 1 for a in range(rank)][axis % rank :]
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
    constant = torch.as_tensor(constant, dtype=torch.float64)  # at once: 0.1 as a float32 is another number
    if rank_of(node) is None or constant.dim() > (rank_of(x) or 0):
        return None  # it adds axes to the value
    zero = torch.zeros_like(constant)
    offset = function(zero, constant)
    return function(zero + 1, constant) - offset, offset
