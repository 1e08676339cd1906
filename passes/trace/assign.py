"""Assignment to an index (``x[key] = value``) as an operation that gives the whole tensor."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxzip.errors import TraceError
from fxzip.passes.trace.views import is_basic, overwritten, steps_of
from fxzip.passes.trace.writes import Call

if TYPE_CHECKING:
    from fxzip.passes.trace.functional import Functionaliser


def assigned(writer: Functionaliser, target: fx.Node, key: Any, value: Any) -> fx.Node:
    """``target`` after ``target[key] = value``."""
    if is_basic(writer, key):
        part = writer.emit(Call("call_function", operator.getitem, (target, key), {}))
        steps = list(steps_of(key, writer.value(target).dim()))
        return overwritten(writer, target, steps, writer.fitted(value, part))
    if _covers(writer, key, target) and not (isinstance(value, fx.Node) and writer.value(value).dim()):
        fill = writer.cast(value, target) if isinstance(value, fx.Node) else value
        return writer.emit(Call("call_function", torch.masked_fill, (target, key, fill), {}), target)
    basic, indices = _split_index(writer, key, writer.value(target).dim())
    part = writer.emit(Call("call_function", operator.getitem, (target, basic), {}))
    if not isinstance(value, fx.Node):
        value = writer.emit(Call("call_function", torch.tensor, (value,), {"dtype": writer.value(target).dtype}))
    arguments = (part, indices, writer.cast(value, target))
    filled = writer.emit(Call("call_function", torch.ops.aten.index_put.default, arguments, {}), part)
    return overwritten(writer, target, list(steps_of(basic, writer.value(target).dim())), filled)


def _covers(writer: Functionaliser, key: Any, target: fx.Node) -> bool:
    """Whether an index is a mask with an element for each element of the target."""
    mask = writer.value(key)
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == writer.value(target).dim()


def _split_index(writer: Functionaliser, key: Any, rank: int) -> tuple[tuple[Any, ...], list[Any]]:
    """An index as torch reads it: first the basic parts, then tensors for axes of what these give."""
    parts = list(key) if isinstance(key, tuple) else [key]
    spans = [_span(writer, part) for part in parts]
    if Ellipsis in [part for part in parts if not isinstance(part, fx.Node)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        missing = rank - sum(spans)
        parts[place : place + 1], spans[place : place + 1] = [slice(None)] * missing, [1] * missing
    basic: list[Any] = []
    indices: list[Any] = []
    for part, span in zip(parts, spans, strict=True):
        if part is None or isinstance(part, slice):
            basic.append(part)
            indices.append(None)
        elif is_basic(writer, part):
            basic.append(part)
        else:
            basic += [slice(None)] * span
            indices.append(part if isinstance(part, fx.Node) else _index(writer, part))
    return tuple(basic), indices


def _span(writer: Functionaliser, part: Any) -> int:
    """How many axes a part of an index is for."""
    value = writer.value(part)
    if part is None or part is Ellipsis:
        return 0
    if isinstance(value, bool):
        raise TraceError(f"{writer.here()}: an index that is True or False alone is not known; use torch.where")
    return value.dim() if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) else 1


def _index(writer: Functionaliser, part: Any) -> fx.Node:
    return writer.emit(Call("call_function", torch.tensor, (list(part),), {}))
