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
    """The name of the operation of ATen that a node calls; empty for any other node."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).removeprefix("aten::")
    name = getattr(node.target, "__name__", "")
    return name if name in _FORMS and getattr(torch, name, None) is node.target else ""


def _replace(node: fx.Node) -> None:
    """Put the checked operation in a node's place; its users take the first of the native one's results."""
    users = list(node.users)
    if not all(user.target is operator.getitem and user.args[1] == 0 for user in users):
        raise SaveError(
            f"node {node.name} cannot be saved: it gives the statistics of {_packet(node)}; use torch.nn.functional's"
        )
    target, args = _FORMS[_packet(node)](node)
    node.target, node.args, node.kwargs = target, args, {}
    for user in users:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)


def _arguments(node: fx.Node) -> list[Any]:
    """A node's arguments in the order of the operation."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        target = getattr(torch.ops.aten, target.__name__).default
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
    if node.target._overloadname != "no_stats":  # type: ignore[union-attr]
        return _batch_norm(node)
    x, weight, bias, training, momentum, eps = _arguments(node)
    return functional.batch_norm, (x, None, None, weight, bias, training, momentum, eps)


def _group_norm(node: fx.Node) -> _Call:
    x, weight, bias, _, _, _, groups, eps = _arguments(node)
    return functional.group_norm, (x, groups, weight, bias, eps)


_FORMS: dict[str, Callable[[fx.Node], _Call]] = {
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm_of_batch,
    "_native_batch_norm_legit_no_training": _batch_norm_in_eval,
    "native_group_norm": _group_norm,
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
