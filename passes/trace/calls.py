"""How a call that torch reports is written as a node: what `recorder` asks about one call."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "true_divide": operator.truediv,
    "pow": operator.pow,
    "matmul": operator.matmul,
    "neg": operator.neg,
    "remainder": operator.mod,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__floordiv__": operator.floordiv,
    "__matmul__": operator.matmul,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
}
_REFLECTED: dict[str, Callable[..., Any]] = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmatmul__": operator.matmul,
    "__rmod__": operator.mod,
}
READS_ARRAYS = {"tolist", "numpy", "__array__"}
READS_VALUES = {"item", "__bool__", "__int__", "__float__", "__index__", *READS_ARRAYS}


def _without_override(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without its own look at ``__torch_function__``, so that the calls inside it are seen."""
    variables = {**function.__globals__, "has_torch_function": lambda _: False}
    return types.FunctionType(
        function.__code__, variables, function.__name__, function.__defaults__, function.__closure__
    )


LOOKED_INTO = {F.multi_head_attention_forward: _without_override(F.multi_head_attention_forward)}


def call_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...]]:
    """The kind, the target and the arguments of the node for a call that torch reported."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # x.T, x.data, x.real
        return "call_function", getattr, (args[0], func.__self__.__name__)  # type: ignore[attr-defined]
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "call_function", func, args
    if getattr(func, "__qualname__", "").startswith(("Tensor.", "TensorBase.")):
        if name in OPERATORS and not kwargs:
            return "call_function", OPERATORS[name], args
        if name in _REFLECTED and not kwargs:
            return "call_function", _REFLECTED[name], (args[1], args[0])
        return "call_method", name, args
    return "call_function", _public(func), args


def _public(func: Callable[..., Any]) -> Callable[..., Any]:
    """The very object that users write (``torch.relu``) for one that is equal to it."""
    for home in (F, torch):
        public = getattr(home, getattr(func, "__name__", ""), None)
        if public == func:
            return public  # type: ignore[no-any-return]
    return func


def with_free_axis(name: str, args: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
    """``x.view(batch * 4, 7, -1)`` with the one size that depends on the batch as -1, and the others known."""
    if name not in {"view", "reshape"} or not isinstance(result, Tensor):
        return args
    if not any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves(args[1:])):
        return args
    sizes = [-1 if is_symbolic(size) else int(size) for size in result.shape]
    if sizes.count(-1) != 1:
        return args
    packed = len(args) == 2 and isinstance(args[1], (tuple, list))
    return (args[0], tuple(sizes)) if packed else (args[0], *sizes)


def is_symbolic(size: Any) -> bool:
    """Whether a size depends on the batch."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def is_constant(value: object) -> bool:
    """Whether a value is a tensor whose values are known while tracing."""
    return isinstance(value, Tensor) and not isinstance(value, (FakeTensor, nn.Parameter))
