"""The weights that PyTorch's operations are linear in: convolutions, matrix products and einsum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fxzip.contraction import Contraction, Window
from fxzip.rules.calls import Call, Linear, name_of, product, rank_of

dense = product("input", "weight", "i,oi->o", bias="bias")
_FROM_THE_RIGHT = product("input", "other", "i,io->o")
_FROM_THE_LEFT = product("other", "input", "is,oi->os")
_ADDED = product("left", "right", "i,io->o", bias="input")


def added_product(call: Call) -> Linear | None:
    """``addmm``: what is added is the bias, if it is a parameter, too."""
    scaled = call.arguments.get("beta", 1) != 1 or call.arguments.get("alpha", 1) != 1
    return None if scaled or call.parameter("input") is None else _ADDED(call)


def matrix_product(call: Call) -> Linear | None:
    """A product of an activation with a matrix, from either side."""
    left = call.parameter("input")
    weight = left or call.parameter("other")
    if weight is None or len(call.shape(weight)) != 2 or (rank_of(call.node) or 0) < 2:
        return None
    return _FROM_THE_LEFT(call) if left else _FROM_THE_RIGHT(call)


def einsum_product(call: Call) -> Linear | None:
    """An einsum of an activation and a parameter."""
    operands: Any = call.arguments.get("operands", ())
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    equation = str(call.arguments.get("equation")).replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    if len(operands) != 2 or len(terms) != 2 or not arrow or "." in equation:
        return None
    place = 0 if name_of(operands[0]) else 1
    named = {"input": operands[1 - place], "weight": operands[place]}
    multiplied = product("input", "weight", f"{terms[1 - place]},{terms[place]}->{output}")
    return multiplied(replace(call, arguments=named))


def convolution(call: Call) -> Linear | None:
    """A convolution; None on an input without a batch."""
    return _windowed(call, _window, transposed=False)


def transposed_convolution(call: Call) -> Linear | None:
    """A transposed convolution; None on an input without a batch, and where it is told its output's size."""
    return None if call.arguments.get("output_size") is not None else _windowed(call, _transposed_window, True)


def _windowed(call: Call, window_of: Any, transposed: bool) -> Linear | None:
    name, source = call.parameter("weight"), call.source("input")
    if name is None or source is None:
        return None
    shape = call.shape(name)
    if rank_of(call.node) != len(shape):
        return None
    contraction = Contraction.convolution(shape, window_of(call.arguments, shape[2:]), transposed)
    return Linear(source, name, contraction, "bias" if call.takes("bias") else None)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A setting for each dimension."""
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * len(kernel) if len(found) == 1 else found


def _spans(given: Mapping[str, Any], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """How many steps lie between the first and the last element of the kernel."""
    return tuple(step * (size - 1) for step, size in zip(_each(given["dilation"], kernel), kernel, strict=True))


def _window(given: Mapping[str, Any], kernel: tuple[int, ...]) -> Window:
    stride, dilation = (_each(given[name], kernel) for name in ("stride", "dilation"))
    mode = given.get("padding_mode", "zeros")
    padding = _padding(given["padding"], _spans(given, kernel), kernel)
    return Window(int(given["groups"]), kernel, stride, dilation, padding, "constant" if mode == "zeros" else mode)


def _transposed_window(given: Mapping[str, Any], kernel: tuple[int, ...]) -> Window:
    padding, extra, stride, dilation = (
        _each(given[name], kernel) for name in ("padding", "output_padding", "stride", "dilation")
    )
    sides = zip(_spans(given, kernel), padding, extra, strict=True)
    around = tuple((span - part, span - part + more) for span, part, more in sides)
    return Window(int(given["groups"]), kernel, (1,) * len(kernel), dilation, around, spacing=stride)


def _padding(value: Any, spans: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """What is added before and behind each dimension; "same" adds the odd one behind."""
    if value == "same":
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((part, part) for part in _each(0 if value == "valid" else value, kernel))
