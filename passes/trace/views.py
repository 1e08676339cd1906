"""Views undone: the tensor that a view was taken of, as it is after the view got another value.

Each is a composition of plain operations of torch: ``slice_scatter``, ``select_scatter`` and ``diagonal_scatter`` for
parts, one axis at a time; a reshape or the inverse permutation for what looks at all elements in another way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxzip.errors import TraceError
from fxzip.passes.trace.writes import Call, name_of

_SAME = {
    "alias", "detach", "data", "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "lift_fresh",
    "requires_grad_", "share_memory_", "detach_", "positive", "dropout", "to_copy", "real", "identity", "cpu", "cuda",
    "long", "int", "bool", "resolve_conj", "resolve_neg", "expand", "expand_as", "broadcast_to", "setitem", "pad",
}  # fmt: skip
_REGROUPED = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel", "_unsafe_view",
    "atleast_1d", "atleast_2d", "atleast_3d", "expand", "expand_as", "broadcast_to",
}  # fmt: skip
_PERMUTED = {
    "permute",
    "transpose",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "t",
    "T",
    "mT",
    "H",
    "mH",
    "adjoint",
}
_SPLIT = {
    "split", "chunk", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "dsplit", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes",
}  # fmt: skip
_COMPLEX = {"view_as_real": torch.view_as_complex, "view_as_complex": torch.view_as_real}


class Writer(Protocol):
    """What writes nodes down and knows what they give."""

    def emit(self, call: Call, like: fx.Node | None = None) -> fx.Node:
        """A new node; ``like`` is a node that gives the same shape and dtype, if one is known."""

    def value(self, node: Any) -> Any:
        """What a node gives, tensors without memory; anything else as it is."""


Step = tuple[str, int, Any]
"""One axis of a basic index: ``select`` an index, ``slice``, or a ``new`` axis."""


def is_basic(writer: Writer, key: Any) -> bool:
    """Whether an index is made of numbers, slices, None and Ellipsis only, so that it gives a view."""
    parts = key if isinstance(key, tuple) else (key,)
    return all(
        part is None or part is Ellipsis or isinstance(part, slice) or _is_number(writer.value(part)) for part in parts
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def steps_of(key: Any, rank: int) -> Iterator[Step]:
    """A basic index of a tensor of that rank, an axis at a time: each applies to the result of those before."""
    parts = list(key) if isinstance(key, tuple) else [key]
    if any(part is Ellipsis for part in parts):
        place = next(number for number, part in enumerate(parts) if part is Ellipsis)
        missing = rank - sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * missing
    axis = 0
    for part in parts:
        if part is None:
            yield "new", axis, None
        elif not isinstance(part, slice):
            yield "select", axis, part
            axis -= 1
        elif part != slice(None):
            yield "slice", axis, part
        axis += 1


def overwritten(writer: Writer, old: fx.Node, steps: Sequence[Step], new: fx.Node) -> fx.Node:
    """``old`` with the part that ``steps`` lead to replaced by ``new``, which has that part's shape and dtype."""
    if not steps:
        return new
    values = [old]
    for kind, axis, key in steps[:-1]:
        if kind == "new":
            values.append(writer.emit(Call("call_function", torch.unsqueeze, (values[-1], axis), {})))
        else:
            index = (*[slice(None)] * axis, key)
            values.append(writer.emit(Call("call_function", operator.getitem, (values[-1], index), {})))
    for (kind, axis, key), before in zip(reversed(steps), reversed(values), strict=True):
        if kind == "new":
            call = Call("call_function", torch.squeeze, (new, axis), {})
        elif kind == "select":
            call = Call("call_function", torch.select_scatter, (before, new, axis, key), {})
        else:
            bounds = [key.start, key.stop, key.step]
            while bounds and bounds[-1] is None:
                bounds.pop()
            call = Call("call_function", torch.slice_scatter, (before, new, axis, *bounds), {})
        new = writer.emit(call, like=before)
    return new


def undone(writer: Writer, view: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """What ``view`` was taken of, after the view has become ``new``.

    Args:
        writer: Writes the nodes.
        view: The node that made the view; a part of a split is the node that took it out of the split.
        old: What the view was taken of, as it was before.
        new: The view's new value, of its shape and dtype.

    Raises:
        TraceError: It is a view that is not known.
    """
    name = _name(view, writer)
    before, after = writer.value(old), writer.value(new)
    parts = _parts_of(view)
    if parts is not None:
        return _part_undone(writer, parts, view, old, new)
    if name in _SAME | {"slice", "narrow"} and _sizes(before) == _sizes(after) and before.dtype == after.dtype:
        return new
    if name == "getitem":
        return overwritten(writer, old, list(steps_of(view.args[1], before.dim())), new)
    if name in ("select", "narrow", "slice"):
        return overwritten(writer, old, [_step(writer, view, name)], new)
    if name == "diagonal":
        ends = (-2, -1) if view.target is torch.linalg.diagonal else (0, 1)
        where = [
            _argument(view, 1, "offset", 0),
            _argument(view, 2, "dim1", ends[0]),
            _argument(view, 3, "dim2", ends[1]),
        ]
        return writer.emit(Call("call_function", torch.diagonal_scatter, (old, new, *where), {}), like=old)
    if name in _PERMUTED and not before.is_complex():
        return writer.emit(Call("call_method", "permute", (new, *_inverse(view, before.dim())), {}), like=old)
    if name in _REGROUPED and [s for s in _sizes(before) if s != "1"] == [s for s in _sizes(after) if s != "1"]:
        return writer.emit(Call("call_method", "reshape_as", (new, old), {}), like=old)
    if name in _REGROUPED - _SAME and before.dtype == after.dtype:
        return writer.emit(Call("call_method", "reshape_as", (new, old), {}), like=old)
    if name in _COMPLEX:
        return writer.emit(Call("call_function", _COMPLEX[name], (new,), {}), like=old)
    raise TraceError(
        f"a tensor is written to through {view.name} ({name}), a view that cannot be followed back to what it was "
        "taken of; write to the tensor itself, or to a copy (clone())"
    )


def _name(view: fx.Node, writer: Writer) -> str:
    if view.op == "call_module":
        owner = view.graph.owning_module
        assert owner is not None
        return type(owner.get_submodule(str(view.target))).__name__.lower()
    name = name_of(view)
    return {"_to_copy": "to_copy", "linalg_diagonal": "diagonal"}.get(name, name)


def _sizes(value: Any) -> list[str]:
    """Sizes as text: comparing symbolic batches as numbers would write a guard."""
    return [str(size) for size in value.shape]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _step(writer: Writer, view: fx.Node, name: str) -> Step:
    """The index that ``select``, ``narrow`` and ATen's ``slice`` stand for."""
    axis = _argument(view, 1, "dim", 0)
    axis = axis % writer.value(view.args[0]).dim() if axis < 0 else axis
    if name == "select":
        return "select", axis, _argument(view, 2, "index")
    start = _argument(view, 2, "start")
    if name == "slice":
        return "slice", axis, slice(start, _argument(view, 3, "end"), _argument(view, 4, "step"))
    length = _argument(view, 3, "length")
    if isinstance(start, int) and start < 0:
        start += writer.value(view.args[0]).shape[axis]
    numbers = isinstance(start, int) and isinstance(length, int)
    stop = start + length if numbers else writer.emit(Call("call_function", operator.add, (start, length), {}))
    return "slice", axis, slice(start, stop)


def _inverse(view: fx.Node, rank: int) -> list[int]:
    """The axes of the inverse permutation, read off what the view does to a tensor whose sizes all differ."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    seen = call_with(view, probe).shape
    return [list(seen).index(size) for size in probe.shape]


def call_with(node: fx.Node, value: Tensor) -> Any:
    """The call of a node of one tensor, on another tensor."""
    args = (value, *node.args[1:])
    if node.op == "call_method":
        return getattr(value, str(node.target))(*args[1:], **node.kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*args, **node.kwargs)


# ---- parts of a split


def _parts_of(view: fx.Node) -> fx.Node | None:
    """The node that split the tensor, if ``view`` takes a part out of a split."""
    source = view.args[0] if view.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and name_of(source) in (_SPLIT | {"unbind"}) else None


def _part_undone(writer: Writer, split: fx.Node, part: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    number: Any = part.args[1]
    whole, parts = writer.value(old), writer.value(split)
    if name_of(split) == "unbind":
        return overwritten(writer, old, [("select", _argument(split, 1, "dim", 0) % whole.dim(), number)], new)
    number %= len(parts)
    differing = [a for a, (s, t) in enumerate(zip(_sizes(whole), _sizes(parts[number]), strict=True)) if s != t]
    if not differing:  # there is only this part
        return new
    (axis,) = differing
    sizes = [part.shape[axis] for part in parts]
    start = sum(sizes[:number])
    if isinstance(start, int) and isinstance(sizes[number], int):
        return overwritten(writer, old, [("slice", axis, slice(start, start + sizes[number]))], new)
    # The batch was split: its sizes are not known, so all parts are put together again.
    now = writer.emit(Call(split.op, split.target, (old, *split.args[1:]), dict(split.kwargs)))
    pieces = [writer.emit(Call("call_function", operator.getitem, (now, i), {})) for i in range(len(parts))]
    pieces[number] = new
    return writer.emit(Call("call_function", torch.cat, (pieces, axis), {}), like=old)
