"""Widths: how many channels the trunk is to have, as a user says it.

A width is a factor of every model's number of channels, for all of the trunk or by modules and channel spaces. A budget
is a bound on what the merged network costs (``"flops<=1.2x"``, ``"params<=1.5x"`` of one network) or on what it keeps
(``"fidelity>=0.98"``): fxzip finds the widths then (`fxzip.passes.allocate`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.errors import OptionError
from fxzip.passes.allocate import rounded

Width: TypeAlias = float | Mapping[str, float] | None
Bound = Literal["flops", "params", "fidelity"]
_COST = re.compile(r"\s*(flops|params)\s*<=?\s*((?:\d+\.?\d*|\.\d+))\s*x\s*", re.IGNORECASE)
_KEPT = re.compile(r"\s*(fidelity)\s*>=?\s*(0?\.\d+|0|1(?:\.0*)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Widths:
    """What a user wants.

    Attributes:
        width: A factor, or one for each of some modules and spaces; None: by the budget.
        bound: What the budget bounds; None: there is none.
        limit: The bound.
    """

    width: Width = None
    bound: Bound | None = None
    limit: float = math.inf

    def __str__(self) -> str:
        if self.bound is not None:
            sign, unit = (">=", "") if self.bound == "fidelity" else ("<=", "x")
            return f"{self.bound}{sign}{self.limit:g}{unit}"
        if isinstance(self.width, Mapping):
            return ", ".join(f"{name} {factor:g}" for name, factor in self.width.items())
        return f"{self.width:g}"


def parse_widths(width: object, budget: object) -> Widths | None:
    """What a user wants, from what he gave; None where the trunk is to be as wide as a model.

    Raises:
        OptionError: It is no width and no budget, or both are given.
    """
    if width is not None and budget is not None:
        raise OptionError(f"width={width!r} and budget={budget!r}: give one of them, a budget finds the width")
    if budget is not None:
        found = _COST.fullmatch(budget) or _KEPT.fullmatch(budget) if isinstance(budget, str) else None
        if found is None or not float(found[2]):
            raise OptionError(
                f'budget={budget!r}: write "flops<=1.2x" or "params<=1.2x", in multiples of one network, or '
                '"fidelity>=0.98"'
            )
        bounds: dict[str, Bound] = {"flops": "flops", "params": "params", "fidelity": "fidelity"}
        return Widths(None, bounds[found[1].lower()], float(found[2]))
    if width is None:
        return None
    if isinstance(width, Mapping):
        if not width or not all(isinstance(name, str) for name in width):
            raise OptionError(f'width={width!r}: name modules or channel spaces, as {{"layer1": 1.3}}')
        return Widths({name: _factor(f"width of {name}", factor) for name, factor in width.items()})
    return Widths(_factor("width", width))


def _factor(name: str, value: object) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not (math.isfinite(number) and number > 0):
        raise OptionError(f"{name}={value!r}: it must be a number above 0, as a share of a network's own channels")
    return number


def chosen_blocks(
    spec: ChannelSpec,
    width: float | Mapping[str, float],
    fixed: Mapping[str, str],
    there: Collection[str],
    n_models: int,
) -> dict[str, int]:
    """As many channels (or blocks of channels) for each family as a width says; those that keep theirs are left out.

    Args:
        spec: The channel spaces.
        width: A factor, or one for each of some modules and spaces.
        fixed: The families that cannot change, with the reasons.
        there: The families that are merged.
        n_models: How many networks are merged.

    Raises:
        OptionError: A name is none, or nothing of that name can change; there would be less than one channel, or more
            than all networks have.
    """
    factors = dict(width) if isinstance(width, Mapping) else {"": width}
    roots = [space for space in spec.spaces if space.parent is None and space.name in there]
    if not any(root.name not in fixed for root in roots):
        raise OptionError(
            f"width={width!r}: no channel space can change its number of channels; {_reasons(roots, fixed)}"
        )
    found: dict[str, int] = {}
    for name, factor in factors.items():
        mine = [root for root in roots if not name or is_of(spec, root, name)]
        free = [root for root in mine if root.name not in fixed]
        if not mine:
            names = sorted({part for root in roots for part in _prefixes(root.name)})
            near = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
            raise OptionError(f"width of {name!r}: no merged channel space lies there; there are {', '.join(near)}")
        if not free:
            raise OptionError(f"width of {name!r}: it must keep its number of channels; {_reasons(mine, fixed)}")
        for root in free:
            found[root.name] = _count(root, factor, n_models)
    return found


def _count(root: ChannelSpace, factor: float, n_models: int) -> int:
    if factor > n_models:
        raise OptionError(f"width={factor:g}: it is {n_models:g} at the most, the channels of all the networks")
    if round(factor * root.size) < 1:
        raise OptionError(
            f"width={factor:g}: less than one of the {root.size} channels or blocks of {root.name} is left"
        )
    return rounded(factor * root.size, n_models * root.size)


def is_of(spec: ChannelSpec, root: ChannelSpace, name: str) -> bool:
    """Whether a family is of a module: its first space, or one that lies in its blocks, is produced there."""
    return any(f"{space.name}.".startswith(f"{name}.") for space in (root, *spec.inside(root.name)))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _reasons(roots: Sequence[ChannelSpace], fixed: Mapping[str, str]) -> str:
    return "; ".join(f"{root.name}: {fixed[root.name]}" for root in roots[:3] if root.name in fixed)
