"""A plan's text: JSON with every bound that the standard leaves open."""

from __future__ import annotations

import json
import math
from typing import Any

MOST_BYTES = 32 << 20
"""The largest plan; those of three ViT-L or three DenseNet-201 take some 2 MB."""
DEEPEST = 64
"""The most lists and objects inside each other; fxzip writes fewer than 20."""

_DIGITS = 20
_LARGEST = 1 << 63


def parse(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: It is no JSON, nests deeper than `DEEPEST`, says a key twice, or has a number that is not
            finite or does not fit into 64 bits.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for outer in level for part in _parts(outer)]
        if not level:
            return value
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


def _parts(value: Any) -> list[Any]:
    """The lists and objects directly inside a value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inside if isinstance(part, (dict, list))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:60]!r} twice")
    return found


def _whole(text: str) -> int:
    if len(text) > _DIGITS or not -_LARGEST <= int(text) < _LARGEST:
        raise ValueError(f"the number {text[:_DIGITS]}... does not fit into 64 bits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_DIGITS]} is not finite")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
