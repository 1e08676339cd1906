"""`Share`: the batches of a loader that one of several processes reads.

Batch k is read by process k % count, and by no other where the loader can be asked for single batches: a list, a
DataLoader of a dataset that is read by index, `ImageLoader`, and several of them in turn. A DataLoader with a
``DistributedSampler`` gives each process its own already. Of any other each process reads all batches, and takes one
of so many.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from fxzip.errors import OptionError
from fxzip.processes import Processes


@runtime_checkable
class Ordered(Protocol):
    """A loader that can be asked for some of its batches."""

    def order(self) -> list[Any] | None:
        """What stands for each batch, in the order of this reading; None where it cannot be asked so."""

    def read(self, order: Sequence[Any]) -> Iterable[Any]:
        """The batches that these stand for."""


class Share:
    """The batches of a loader that this process reads.

    Attributes:
        loader: The loader as it was given.
        processes: Those that share it.
    """

    def __init__(self, loader: Iterable[Any], processes: Processes) -> None:
        self.loader, self.processes = loader, processes

    def __iter__(self) -> Iterator[Any]:
        """Read it; every process must, since loaders that shuffle are read in the order of the first one."""
        rank, count = self.processes.rank, self.processes.count
        if count == 1 or is_split(self.loader):
            return iter(self.loader)
        order = self.processes.agreed("the order of the batches", lambda: order_of(self.loader))
        if order is None:
            return itertools.islice(self.loader, rank, None, count)
        return iter(read(self.loader, order[rank::count]))

    @property
    def whole(self) -> int:
        """Number of batches of all processes together; raises TypeError where the loader does not know its own."""
        found = len(self.loader)  # type: ignore[arg-type]
        return found * self.processes.count if is_split(self.loader) else found

    def __len__(self) -> int:
        """Number of batches of this process, or one more."""
        return -(-self.whole // self.processes.count)


def is_split(loader: Any) -> bool:
    """Whether a loader gives each process its own batches already, as by a DistributedSampler.

    Raises:
        OptionError: Of several loaders some do, and some do not.
    """
    parts = [is_split(part) for part in getattr(loader, "loaders", ())]
    if any(parts) and not all(parts):
        raise OptionError("some of the loaders have a DistributedSampler, and some have none: give each one, or none")
    if parts:
        return parts[0]
    samplers = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    samplers.append(getattr(samplers[-1], "sampler", None))
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)


def order_of(loader: Any) -> list[Any] | None:
    """What stands for each batch of a loader; None where it cannot be asked for single ones."""
    if isinstance(loader, Ordered):
        return loader.order()
    if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
        return list(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    return list(range(len(loader))) if isinstance(loader, Sequence) else None


def read(loader: Any, order: Sequence[Any]) -> Iterable[Any]:
    """The batches of a loader that these stand for."""
    if isinstance(loader, Ordered):
        return loader.read(order)
    if isinstance(loader, DataLoader):
        return _alike(loader, order)
    return (loader[number] for number in order)


def _alike(loader: DataLoader[Any], order: Sequence[Any]) -> Iterable[Any]:
    """A DataLoader that reads in the same way, but these indices."""
    own: dict[str, Any] = {"batch_size": None, "sampler": order}
    if loader.batch_sampler is not None:
        own = {"batch_sampler": order}
    same = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
            "generator", "prefetch_factor")  # fmt: skip
    return DataLoader(loader.dataset, **own, **{name: getattr(loader, name) for name in same})


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches all processes read together; None where nobody knows."""
    try:
        if isinstance(loader, Sized):
            return int(getattr(loader, "whole", None) or len(loader))
    except TypeError:  # a DataLoader over an iterable dataset has __len__, and raises
        pass
    return None
