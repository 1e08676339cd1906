"""Which nodes look at which memory, and through which views."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(eq=False)
class Memory:
    """Memory that nodes look at: the node that holds all of it now, and how often it was written to."""

    now: fx.Node
    version: int = 0


@dataclass(eq=False)
class Alias:
    """How a node looks at memory.

    Attributes:
        memory: What it looks at.
        parent: The alias that the view was taken of; None: the node is all of the memory.
        made: The node that took the view; None where that is not known.
        source: The node that ``made`` takes the view of.
        now: The node that gives the view's value.
        version: The writing after which it does.
    """

    memory: Memory
    parent: Alias | None
    made: fx.Node | None
    source: fx.Node | None
    now: fx.Node
    version: int


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one memory are the same view of it."""
    layouts = [[*map(str, (*t.shape, *t.stride(), t.storage_offset())), t.dtype] for t in (one, other)]
    return layouts[0] == layouts[1]
