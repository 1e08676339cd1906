"""What PyTorch's operations do to channels as vectors, for `register_rule`; what says nothing bends them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxzip.rules.calls import Joint


def moves(given: Mapping[str, Any]) -> Joint:
    """Vectors are moved about, negated, or averaged with weights that add up to one."""
    return Joint("move")


def spreads(given: Mapping[str, Any]) -> Joint:
    """Vectors are averaged with zeros among them, or added up where patches overlap."""
    return Joint("move", constant=False)


def pads(given: Mapping[str, Any]) -> Joint | None:
    """Vectors get others beside them: zeros, or some of them again; any other number is no turned vector."""
    args = given.get("args", ())
    sides = args[1] if len(args) > 1 else None
    if isinstance(sides, (tuple, list)) and all(isinstance(side, int) and side == 0 for side in sides):
        return moves(given)  # nothing is padded
    filled = [*args[2:], given.get("kwargs", {}).get("value"), given.get("value")]
    return None if any(isinstance(value, (int, float)) and value != 0 for value in filled) else spreads(given)


def averages(given: Mapping[str, Any]) -> Joint:
    """The mean over axes."""
    return Joint("reduce")


def totals(given: Mapping[str, Any]) -> Joint:
    """The sum over axes."""
    return Joint("reduce", constant=False)


def sums(given: Mapping[str, Any]) -> Joint:
    """All operands together."""
    return Joint("sum")


def multiplies(given: Mapping[str, Any]) -> Joint:
    """Each operand by itself."""
    return Joint("product")


def divides(given: Mapping[str, Any]) -> Joint:
    """The first operand alone."""
    return Joint("product", only=0)


def attends(given: Mapping[str, Any]) -> Joint:
    """Attention: values are averaged, with weights that queries and keys give."""
    return Joint("product", only=2)


def squares(given: Mapping[str, Any]) -> Joint | None:
    """A power, which is a square or nothing that is known."""
    exponents = (*given.get("args", ())[1:], *given.get("kwargs", {}).values())
    return Joint("square") if all(value == 2 for value in exponents) else None
