"""Pairs: units in a row, the first of which matters only by what the second one makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxzip.passes.refit.units import Unit


@dataclass(frozen=True, eq=False)
class Pair:
    """Two units in a row.

    Attributes:
        inner: The unit whose value only the outer one uses.
        outer: The unit that it is for.
        path: The nodes from the inner root (which is left out) to the outer root, and all that the outer unit claims.
    """

    inner: Unit
    outer: Unit
    path: tuple[fx.Node, ...]

    @property
    def reads(self) -> set[fx.Node]:
        """The nodes outside whose values the two are computed from."""
        mine = {*self.path, *self.inner.claimed}
        return {source for node in mine for source in node.all_input_nodes if source not in mine}


def find_pairs(module: fx.GraphModule, units: Iterable[Unit]) -> list[Pair]:
    """The units whose values go to one other unit only, each with that one."""
    owner = {node: unit for unit in units for node in unit.claimed}
    found = (_pair(module, unit, owner) for unit in dict.fromkeys(owner.values()))
    return [pair for pair in found if pair is not None]


def _pair(module: fx.GraphModule, inner: Unit, owner: dict[fx.Node, Unit]) -> Pair | None:
    outer: Unit | None = None
    path: set[fx.Node] = set()
    pending = list(inner.root.users)
    while pending:
        node = pending.pop()
        if node in path:
            continue
        here = owner.get(node)
        if node.op == "output" or (here is not None and outer not in (None, here)):
            return None
        path.add(node)
        outer = here or outer
        if here is None or node is not here.root:
            pending += node.users
    if outer is None:
        return None
    path |= outer.claimed
    return Pair(inner, outer, tuple(node for node in module.graph.nodes if node in path))
