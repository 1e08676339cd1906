"""Operations that trust their arguments, and the checked ones that a plan has in their place.

The native norms take lengths on trust: with short statistics they read and write foreign memory. The deformable
convolution of torchvision does so where an offset is not a number.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxzip.errors import SaveError

DEFORM = "torchvision.ops.deform_conv2d"

_Call = tuple[Callable[..., Any], tuple[Any, ...]]


def safe_graph(graph: fx.Graph) -> fx.Graph:
    """The same graph with checked operations; a copy if any of it changes.

    Raises:
        SaveError: A native norm is used in a way that no checked one has.
    """
    if not any(_packet(node) in _FORMS for node in graph.nodes):
        return graph
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in list(copied.nodes):
        if _packet(node) in _FORMS:
            _replace(node)
    return copied


def _packet(node: fx.Node) -> str:
    """The name of the operation that a node calls, if it has a checked form; empty otherwise."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target._schema.name)
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
    else:
        plain = getattr(target, "__name__", "")
        name = f"aten::{plain}" if getattr(torch, plain, None) is target else ""
    return name if node.op == "call_function" and name in _FORMS else ""


def _replace(node: fx.Node) -> None:
    """Put the checked operation in a node's place; users of a norm take the first of the native one's results."""
    name, users = _packet(node), list(node.users)
    target, args = _FORMS[name](node)
    node.target, node.args, node.kwargs = target, args, {}
    if name == _NATIVE_DEFORM:
        return
    if not all(user.target is operator.getitem and user.args[1] == 0 for user in users):
        raise SaveError(f"node {node.name} cannot be saved: it gives statistics, too; use torch.nn.functional's norms")
    for user in users:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)


def _arguments(node: fx.Node) -> list[Any]:
    """A node's arguments in the order of the operation."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        space, _, name = _packet(node).partition("::")
        target = getattr(getattr(torch.ops, space), name).default
    places = target._schema.arguments
    given = dict(zip((place.name for place in places), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(place.name, place.default_value) for place in places]


def _batch_norm(node: fx.Node) -> _Call:
    x, weight, bias, mean, variance, training, momentum, eps = _arguments(node)
    return functional.batch_norm, (x, mean, variance, weight, bias, training, momentum, eps)


def _batch_norm_in_eval(node: fx.Node) -> _Call:
    x, weight, bias, mean, variance, momentum, eps = _arguments(node)
    return functional.batch_norm, (x, mean, variance, weight, bias, False, momentum, eps)


def _batch_norm_of_batch(node: fx.Node) -> _Call:
    if getattr(node.target, "_overloadname", "") != "no_stats":
        return _batch_norm(node)
    x, weight, bias, training, momentum, eps = _arguments(node)
    return functional.batch_norm, (x, None, None, weight, bias, training, momentum, eps)


def _group_norm(node: fx.Node) -> _Call:
    x, weight, bias, _, _, _, groups, eps = _arguments(node)
    return functional.group_norm, (x, groups, weight, bias, eps)


def _deform(node: fx.Node) -> _Call:
    x, weight, offset, mask, bias, *numbers = _arguments(node)
    stride, padding, dilation = (tuple(numbers[place : place + 2]) for place in (0, 2, 4))
    return deform_conv2d, (x, offset, weight, bias, stride, padding, dilation, mask if numbers[8] else None)


_NATIVE_DEFORM = "torchvision::deform_conv2d"
_FORMS: dict[str, Callable[[fx.Node], _Call]] = {
    "aten::native_batch_norm": _batch_norm,
    "aten::_native_batch_norm_legit": _batch_norm_of_batch,
    "aten::_native_batch_norm_legit_no_training": _batch_norm_in_eval,
    "aten::native_group_norm": _group_norm,
    _NATIVE_DEFORM: _deform,
}


def is_deform(target: object) -> bool:
    """Whether a function is torchvision's deformable convolution, or ours."""
    ops = sys.modules.get("torchvision.ops")
    return target is deform_conv2d or (ops is not None and target is getattr(ops, "deform_conv2d", None))


def deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`torchvision.ops.deform_conv2d`, bit by bit, but for offsets that are not a number: these count as 0.

    Args:
        input: N × C_in × H × W.
        offset: N × (2 · groups · kernel's height · kernel's width) × H_out × W_out.
        weight: C_out × (C_in / groups) × kernel's height × kernel's width.
        bias: C_out.
        stride: Of the kernel.
        padding: Of the input, with zeros.
        dilation: Of the kernel.
        mask: N × (groups · kernel's height · kernel's width) × H_out × W_out.

    Returns:
        N × C_out × H_out × W_out.

    Raises:
        ValueError: An axis is empty or is missing.
    """
    from torchvision.ops import deform_conv2d as convolve

    for name, tensor in (("input", input), ("offset", offset), ("weight", weight)):
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(
                f"deform_conv2d: the {name} is of shape {list(tensor.shape)}, not of four axes with values"
            )
    offset = torch.where(offset.isnan(), 0.0, offset)
    return convolve(input, offset, weight, bias, stride, padding, dilation, mask)  # type: ignore[no-any-return]
