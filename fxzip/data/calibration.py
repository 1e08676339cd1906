"""The images that are fitted on, shared out among the processes of a merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.batches import Given, batch_size
from fxzip.data.held import taken
from fxzip.data.loops import batches
from fxzip.errors import CalibrationError
from fxzip.processes import ALONE, Processes
from fxzip.settings import RefitOptions


@dataclass(frozen=True, eq=False)
class Images:
    """Images that are kept for a fit.

    Attributes:
        own: The batches of this process.
        sizes: How many images there are in each batch of all processes. Batch k is of process k % count; 0 where that
            one has no more, or where nothing of it is used.
        processes: Those that share them.
    """

    own: tuple[Given, ...]
    sizes: tuple[int, ...]
    processes: Processes = ALONE

    @property
    def count(self) -> int:
        """How many images all processes have."""
        return sum(self.sizes)

    @property
    def numbers(self) -> list[int]:
        """The numbers of this process's batches."""
        mine = range(self.processes.rank, len(self.sizes), self.processes.count)
        return [number for number in mine if self.sizes[number]]

    def upto(self, batches: int) -> Images:
        """The first batches, so many of all processes together."""
        own = [batch for number, batch in zip(self.numbers, self.own, strict=True) if number < batches]
        return replace(self, own=tuple(own), sizes=self.sizes[:batches])

    def thinned(self, count: int) -> Images:
        """At most so many of the images, drawn at random from all of them, in their order; always the same."""
        if self.count <= count:
            return self
        drawn = torch.zeros(self.count, dtype=torch.bool)
        drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[:count]] = True
        parts = drawn.split(list(self.sizes))
        own = [taken(batch, parts[number]) for number, batch in zip(self.numbers, self.own, strict=True)]
        sizes = tuple(int(part.sum()) for part in parts)
        kept = [batch for batch, number in zip(own, self.numbers, strict=True) if sizes[number]]
        return replace(self, own=tuple(kept), sizes=sizes)


def read_images(
    loader: Iterable[Any], device: torch.device | None, options: RefitOptions, processes: Processes = ALONE
) -> Images:
    """The calibration batches, up to the number of images that are wanted and as many as fit into memory.

    Each process keeps those that its loader gives; ``options.memory`` is that of each.

    Raises:
        CalibrationError: The loader is empty.
        ProcessError: It fails in another process.
    """
    own: list[Given] = []
    sizes: list[int] = []
    bytes_of = [0] * processes.count
    with batches(loader, device=device, progress=False, least=0) as given:
        for mine, row in _rows(given, processes):
            for rank, (images, size) in enumerate(row):
                sizes.append(images)
                if images and rank == processes.rank and mine is not None:
                    own.append(mine)
                bytes_of[rank] += size
                full = max(bytes_of) * (1 + 1 / -(-len(sizes) // processes.count)) > options.memory
                if (full and sum(sizes) >= options.least_images) or sum(sizes) >= options.images:
                    return Images(tuple(own), tuple(sizes), processes)
    if not sum(sizes):
        raise CalibrationError("the loader gave no batches (is it a generator that was used up before?)")
    return Images(tuple(own), tuple(sizes), processes)


def _rows(
    given: Iterator[tuple[tuple[Any, ...], dict[str, Any]]], processes: Processes
) -> Iterator[tuple[Given | None, list[tuple[int, int]]]]:
    """This process's next batch, and how many images and bytes are in that of each process; until all have ended."""
    while True:
        mine: Given | None = None
        with processes.together("reading images"):
            found = next(given, None)
            if found is not None:
                mine = Given(*found)
        size = (0, 0) if mine is None else (batch_size(*mine), _bytes(mine))
        row = processes.everywhere("reading images", size)
        if not any(images for images, _ in row):
            return
        yield mine, row


def _bytes(batch: Given) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(tuple(batch)) if isinstance(leaf, Tensor))
