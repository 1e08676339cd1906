"""Frozen dataclasses of plain values (the report) as JSON, and back by their annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fxzip.errors import FileFormatError, SaveError

Record = TypeVar("Record")
_SCALARS = (bool, int, float, str)


def write_record(value: Any) -> Any:
    """A dataclass, with all in it, as JSON; infinite numbers are strings.

    Raises:
        SaveError: Something in it is of no plain type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: write_record(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): write_record(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [write_record(part) for part in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if value is None or isinstance(value, _SCALARS):
        return value
    raise SaveError(f"the report holds a {type(value).__name__}, which cannot be saved")


def read_record(kind: type[Record], value: Any) -> Record:
    """The dataclass that `write_record` wrote; fields that it does not know are passed over.

    Raises:
        FileFormatError: A field is missing or of another type.
    """
    if not isinstance(value, dict):
        raise FileFormatError(f"there is no {kind.__name__}")
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in value and field.init:
            found[field.name] = _read(hints[field.name], value[field.name], f"{kind.__name__}.{field.name}")
    try:
        return kind(**found)
    except TypeError as error:
        raise FileFormatError(f"the {kind.__name__} is incomplete: {error}") from error


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _read(next(part for part in parts if part is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return read_record(typing.cast(type[Any], hint), value)
    if origin is tuple and isinstance(value, list):
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(each) == len(value):
            return tuple(_read(part, item, where) for part, item in zip(each, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _read(parts[1], item, where) for key, item in value.items()}
    if hint is float and (type(value) in (int, float) or value in ("inf", "-inf", "nan")):
        return float(value)
    if hint in _SCALARS and type(value) is hint:
        return value
    raise FileFormatError(f"{where} cannot be {value!r}")
