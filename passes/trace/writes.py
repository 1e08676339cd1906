"""Which nodes write to memory, and the plain operation that computes what they write.

This is the one place that knows torch's ways to say so: methods and functions that end with an underscore, augmented
assignments, ``inplace=True`` (by name or by position, of functions and of modules), ``out=``, and the schemas of
ATen's operators. Assignment to an index is left to `functional`, for it needs views.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxzip.errors import TraceError
from fxzip.passes.trace.calls import OPERATORS

_AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
_AUGMENTED_METHODS = {function.__name__: plain for function, plain in _AUGMENTED.items()}
_SHAPES_ONLY = {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}
_NOTHING = {"requires_grad_", "share_memory_", "detach_", "rename_"}


@dataclass(frozen=True)
class Call:
    """What a node calls: the fields of `torch.fx.Node`."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def name_of(node: fx.Node) -> str:
    """The bare name of what a node calls: the method, the function, the attribute that is read."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def mutates(func: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a call of a function, or of a method by its name, writes to the memory of one of its arguments."""
    kwargs = kwargs or {}
    if isinstance(func, torch._ops.OpOverload):
        return bool(func._schema.is_mutable)
    if func in _AUGMENTED or func is operator.setitem or kwargs.get("out") is not None:
        return True
    name = func if isinstance(func, str) else getattr(func, "__name__", "")
    if name in _NOTHING or name in _SHAPES_ONLY:
        return False
    if (name.strip("_") in _AUGMENTED_METHODS and name.startswith("__")) or name == "__setitem__":
        return True
    return (name.endswith("_") and not name.endswith("__")) or bool(_in_place_flag(func, args, kwargs))


def writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node writes to the memory of one of its arguments."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False) is True
    return node.op in ("call_function", "call_method") and mutates(node.target, node.args, node.kwargs)


def changes_shape(func: Any) -> bool:
    """Whether a method changes what a tensor looks like, and none of its elements (``unsqueeze_``)."""
    return (func if isinstance(func, str) else getattr(func, "__name__", "")) in _SHAPES_ONLY


def written(node: fx.Node) -> fx.Node:
    """The node whose memory is written to by one that `writes`.

    Raises:
        TraceError: It is not one tensor.
    """
    target: Any = node.kwargs.get("out") if node.op != "call_module" else None
    if target is None:
        target = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if isinstance(node.target, torch._ops.OpOverload):
        found = [a for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        position = [a.name for a in node.target._schema.arguments].index(found[0].name)
        target = node.kwargs.get(found[0].name, node.args[position] if position < len(node.args) else None)
        target = target if len(found) == 1 else None
    if not isinstance(target, fx.Node):
        raise TraceError(f"{node.name} writes to several tensors at once ({name_of(node)}); write to one after another")
    return target


class Memories:
    """Tells the memory of tensors apart; what it was asked about stays alive, so that no address is used again."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> int:
        """A number that views of one tensor share; a parameter's is that of its fake tensor."""
        with torch._C.DisableTorchFunction():
            if id(tensor) not in self._kept:
                fake = tensor
                if not isinstance(tensor, FakeTensor):
                    fake = self._mode.fake_tensor_converter.from_real_tensor(self._mode, tensor)
                self._kept[id(tensor)] = (tensor, fake)
            return int(self._kept[id(tensor)][1].untyped_storage()._cdata)


def without_shape_changes(node: fx.Node) -> None:
    """``unsqueeze`` for ``unsqueeze_``: later uses read the node, as they read its tensor."""
    if node.op in ("call_function", "call_method") and changes_shape(name_of(node)):
        plain = _plain(node)
        node.op, node.target = plain.op, plain.target


def plain_call(node: fx.Node) -> Call:
    """The call without a write that computes what a node writes.

    Raises:
        TraceError: There is none.
    """
    kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    if isinstance(node.target, torch._ops.OpOverload):
        return _plain_overload(node)
    if node.target in _AUGMENTED:
        return Call("call_function", _AUGMENTED[node.target], node.args, kwargs)
    flag = _in_place_flag(node.target, node.args, node.kwargs)
    if flag == "inplace":
        return Call(node.op, node.target, node.args, {**kwargs, "inplace": False})
    if isinstance(flag, int):
        return Call(node.op, node.target, (*node.args[:flag], False, *node.args[flag + 1 :]), kwargs)
    if len(kwargs) < len(node.kwargs):
        return Call(node.op, node.target, node.args, kwargs)
    return _plain(node)


def _plain(node: fx.Node) -> Call:
    name = name_of(node)
    if name.startswith("__"):
        return Call("call_function", _AUGMENTED_METHODS[name.strip("_")], node.args, dict(node.kwargs))
    plain = name[:-1]
    if node.op == "call_method" and hasattr(Tensor, plain):
        if plain in OPERATORS and not node.kwargs and len(node.args) < 3:
            return Call("call_function", OPERATORS[plain], node.args, {})
        return Call("call_method", plain, node.args, dict(node.kwargs))
    for home in (F, torch):
        if node.op == "call_function" and callable(getattr(home, plain, None)):
            return Call("call_function", getattr(home, plain), node.args, dict(node.kwargs))
    raise TraceError(f"{node.name} writes in place ({name}) what no plain operation computes; write it out of place")


def _plain_overload(node: fx.Node) -> Call:
    """``aten.add.Tensor`` for ``aten.add_.Tensor`` and for ``aten.add.out``, by the arguments that they share."""
    overload: Any = node.target
    known = overload._schema.arguments
    named = {argument.name: value for argument, value in zip(known, node.args, strict=False)} | node.kwargs
    out = {a.name for a in known if a.alias_info is not None and a.alias_info.is_write and a.is_out}
    given = {key: value for key, value in named.items() if key not in out}
    packet = getattr(torch.ops.aten, name_of(node).removesuffix("_"), None)
    for name in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, name)
        arguments = candidate._schema.arguments
        needed = {a.name for a in arguments if not a.has_default_value()}
        fits = needed <= given.keys() <= {a.name for a in arguments}
        same = bool(out) or [str(a.type) for a in arguments] == [str(a.type) for a in known]
        if fits and same and not candidate._schema.is_mutable:
            positional = tuple(given[a.name] for a in arguments if a.name in given and not a.kwarg_only)
            keywords = {a.name: given[a.name] for a in arguments if a.name in given and a.kwarg_only}
            return Call("call_function", candidate, positional, keywords)
    raise TraceError(f"{node.name} writes in place ({overload}) what no plain operation computes")


def _in_place_flag(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | int | None:
    """Where a call says ``inplace=True``: by that name or at a position; None if it does not."""
    if kwargs.get("inplace"):
        return "inplace"
    if True in [a for a in args if isinstance(a, bool)]:
        position = _flag_position(func)
        if position is not None and position < len(args) and args[position] is True:
            return position
    return None


@functools.cache
def _flag_position(func: Any) -> int | None:
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # a builtin, or a method's name
        return None
    return names.index("inplace") if "inplace" in names else None
