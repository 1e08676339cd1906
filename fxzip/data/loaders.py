"""One loader from a loader for each model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor

from fxzip.data.shares import order_of, read
from fxzip.errors import OptionError


class Interleaved:
    """The batches of several loaders in turn; when a loader ends, the others go on without it.

    Attributes:
        loaders: The loaders.
    """

    def __init__(self, loaders: Sequence[Iterable[Any]]) -> None:
        self.loaders = tuple(loaders)

    def __iter__(self) -> Iterator[Any]:
        running = [iter(loader) for loader in self.loaders]
        while running:
            for iterator in tuple(running):
                try:
                    yield next(iterator)
                except StopIteration:
                    running.remove(iterator)

    def order(self) -> list[Any] | None:
        """What stands for each batch: the number of its loader, and what stands for it there (`fxzip.data.shares`)."""
        orders = [order_of(loader) for loader in self.loaders]
        if any(order is None for order in orders):
            return None
        turns = itertools.zip_longest(*([(k, [one]) for one in order or ()] for k, order in enumerate(orders)))
        return [one for turn in turns for one in turn if one is not None]

    def read(self, order: Sequence[Any]) -> Iterator[Any]:
        """The batches that these stand for."""
        own = [[one for number, (one,) in order if number == k] for k in range(len(self.loaders))]
        running = [iter(read(loader, mine)) for loader, mine in zip(self.loaders, own, strict=True)]
        for number, _ in order:
            yield next(running[number])

    def __len__(self) -> int:
        """Number of batches; raises TypeError where a loader does not know its own."""
        return sum(len(loader) if isinstance(loader, Sized) else _no_length(loader) for loader in self.loaders)


def _no_length(loader: object) -> int:
    raise TypeError(f"{type(loader).__name__} has no length")


def as_one_loader(loader: Any, names: Sequence[str]) -> Any:
    """A loader for each model as one loader; any other loader as it is.

    Args:
        loader: A list of loaders, one for each model, or a dict of them by the tasks' names; or one loader. A list
            of tensors, of tuples or of dicts is one loader, of batches.
        names: The tasks.

    Raises:
        OptionError: There are more or fewer loaders than models, or the dict's names are not the tasks'.
    """
    if isinstance(loader, Mapping):
        if set(loader) != set(names):
            raise OptionError(
                f"loaders for {', '.join(map(str, loader))}, but tasks {', '.join(names)}: give a loader for each task"
            )
        return Interleaved([loader[name] for name in names])
    if not isinstance(loader, list | tuple) or not loader or not all(map(_is_loader, loader)):
        return loader
    if len(loader) != len(names):
        raise OptionError(f"{len(loader)} loaders for {len(names)} models: give one for all, or one for each")
    return Interleaved(loader)


def _is_loader(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(
        value, Tensor | np.ndarray | list | tuple | Mapping | str | bytes
    )
