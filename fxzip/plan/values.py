"""The arguments of nodes and layers as plain JSON, and back.

JSON's own values stand for themselves, an array is a list; anything else is an object of one key that says
what it is: ``{"node": "relu_1"}``, ``{"tuple": [1, 2]}``, ``{"dtype": "float32"}``, ``{"float": "inf"}``...
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxzip.errors import FileFormatError, SaveError

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_FORMATS = {name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d")}
_FORMATS["preserve_format"] = torch.preserve_format
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
_FLOATS = ("inf", "-inf", "nan")

Nodes = Mapping[str, fx.Node]


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def encode(value: Any) -> Any:
    """A value as JSON.

    Raises:
        SaveError: It is not of a plain type.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(part) for part in value]}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, encode(part)] for key, part in value.items()]}
    return _encode_atom(value)


def _encode_atom(value: Any) -> dict[str, Any]:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device) and DEVICE.fullmatch(str(value)):
        return {"device": str(value)}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    for name, known in _FORMATS.items():
        if value is known:
            return {"memory_format": name}
    raise SaveError(f"an argument is a {type(value).__name__}, which cannot be saved")


def decode(value: Any, nodes: Nodes | None = None) -> Any:
    """The value that JSON stands for.

    Args:
        value: What `encode` gave.
        nodes: The nodes that it may refer to, by name.

    Raises:
        FileFormatError: It is no such value.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(part, nodes) for part in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind in _READERS:
            return _READERS[kind](content, nodes or {})
    raise FileFormatError(f"{_shown(value)} is not a value that a saved graph may hold")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _parts(content: Any, nodes: Nodes, count: int | None = None) -> list[Any]:
    if not isinstance(content, list) or (count is not None and len(content) != count):
        raise FileFormatError(f"{_shown(content)} is not a list of values")
    return [decode(part, nodes) for part in content]


def _node(content: Any, nodes: Nodes) -> fx.Node:
    if not isinstance(content, str) or content not in nodes:
        raise FileFormatError(f"it uses {_shown(content)}, which is not a node before it")
    return nodes[content]


def _dict(content: Any, nodes: Nodes) -> dict[str | int, Any]:
    if not isinstance(content, list):
        raise FileFormatError(f"{_shown(content)} is not a list of pairs")
    result: dict[str | int, Any] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise FileFormatError(f"{_shown(pair)} is not a pair of a key and a value")
        result[pair[0]] = decode(pair[1], nodes)
    return result


def _device(content: Any, _: Nodes) -> torch.device:
    if not isinstance(content, str) or not DEVICE.fullmatch(content):
        raise FileFormatError(f"{_shown(content)} is not a device")
    return torch.device(content)


def _one_of(table: Mapping[str, Any], what: str) -> Callable[[Any, Nodes], Any]:
    def read(content: Any, _: Nodes) -> Any:
        if not isinstance(content, str) or content not in table:
            raise FileFormatError(f"{_shown(content)} is not a {what}")
        return table[content]

    return read


_READERS: dict[str, Callable[[Any, Nodes], Any]] = {
    "tuple": lambda content, nodes: tuple(_parts(content, nodes)),
    "slice": lambda content, nodes: slice(*_parts(content, nodes, 3)),
    "dict": _dict,
    "node": _node,
    "device": _device,
    "ellipsis": lambda _, __: Ellipsis,
    "float": _one_of({name: float(name) for name in _FLOATS}, "number"),
    "dtype": _one_of(_DTYPES, "dtype"),
    "memory_format": _one_of(_FORMATS, "memory format"),
    "layout": _one_of({"strided": torch.strided}, "layout"),
}
