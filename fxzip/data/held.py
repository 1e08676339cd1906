"""Images that are held back from matching and from the fit, so that a merge can be measured on what it did not see.

They are chosen while the loader is read for the first time, spread over all of it, and known by their contents from
then on, so that they stay held back where a loader shuffles.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.batches import Given, batch_size, map_tensors, model_inputs
from fxzip.data.shares import length_of
from fxzip.processes import ALONE, Processes

SHARE, LEAST, MOST = 10, 64, 512
"""One image of ``SHARE`` is held back, but no fewer than ``LEAST`` and no more than ``MOST``..."""
LARGEST_SHARE = 4
"""... and never more than one of so many: where images are few, the fit needs them more."""


class HeldBack:
    """Picks the images that are held back while a loader is read, and keeps them.

    Attributes:
        held: Those that were held back, batch by batch.
        given: How many others there were.
    """

    def __init__(
        self, loader: Iterable[Any], most: int = MOST, processes: Processes = ALONE, size: int | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            loader: What will be read.
            most: How many images are held back at most.
            processes: Those that read a share of it each.
            size: How many images are in a batch, where several read: they cannot tell how many the others read so far.
        """
        self._loader, self._most, self._processes, self._size = loader, most, processes, size
        self.held: list[Given] = []
        self.given = 0
        self._place = self._every = self._number = 0

    def rest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The samples of the next batch that are not held back, bool (samples,); None for all of them."""
        given = Given(args, kwargs)
        size = batch_size(*given)
        self._every = self._every or _stride(self._loader, self._size or size)
        place = self._place
        if self._size is not None:
            place = self._size * (self._number * self._processes.count + self._processes.rank)
        mine = one_of(torch.arange(place, place + size), self._every)
        self._number, self._place = self._number + 1, self._place + size
        if _picked_before(place, self._every) >= self._most or not mine.any():
            self.given += size
            return None
        self.held.append(taken(given, mine))
        self.given += size - int(mine.sum())
        return ~mine


def size_of_batches(loader: Iterable[Any], processes: Processes) -> int | None:
    """How many images are in a loader's batches, the last ones aside, where several processes read it."""
    if processes.count == 1:
        return None
    with processes.together("reading the first batch"):
        first = next(iter(loader), None)
        size = 0 if first is None else batch_size(*model_inputs(first))
    return max(processes.everywhere("the size of the batches", size))


def one_of(place: Tensor, every: int) -> Tensor:
    """Which of these places are picked, one in each run of ``every``: bool, as long as ``place``, always the same.

    Where in its run a place is picked differs from run to run: loaders often give their tasks or classes in turn, and
    with an even step all picks would be of one of them. In the first run it is the last place, so that none is picked
    of fewer than ``every``.
    """
    run = place // every
    shift = run * 2654435761 % 2**32 >> 16  # Knuth's multiplicative hashing
    return place % every == (every - 1 + shift) % every


def _picked_before(place: int, every: int) -> int:
    """How many places below this one `one_of` picks."""
    run = torch.arange(place // every * every, place)
    return place // every + int(one_of(run, every).sum())


def _stride(loader: Iterable[Any], size: int) -> int:
    """One image of how many is held back, the first batch being of this size; many where nobody knows the length."""
    batches = length_of(loader)
    count = MOST * SHARE if batches is None else batches * size
    return min(max(count // LEAST, LARGEST_SHARE), SHARE)


def without(loader: Iterable[Any], held: Sequence[Given], processes: Processes = ALONE) -> Iterator[Given]:
    """A loader's batches without these images, whatever order they come in; of equal ones so many as were held back.

    What other processes held back is left out, too: a loader that shuffles may give it to this one.
    """
    own = [mark for batch in held for mark in _marks(batch)]
    left = Counter(mark for marks in processes.everywhere("the images held back", own) for mark in marks)
    for batch in loader:
        given = Given(*model_inputs(batch))
        if not left:
            yield given
            continue
        rest = torch.tensor([not _taken_off(left, mark) for mark in _marks(given)])
        if rest.all():
            yield given
        elif rest.any():
            yield taken(given, rest)


def _taken_off(left: Counter[int], mark: int) -> bool:
    """Whether something with this mark is left, of which there is one less then."""
    if mark not in left:
        return False
    left[mark] -= 1
    if not left[mark]:
        del left[mark]
    return True


def count_images(inputs: Sequence[Given]) -> int:
    """How many images (or other samples) there are in batches."""
    return sum(batch_size(*batch) for batch in inputs)


def _marks(batch: Given) -> list[int]:
    """A checksum of each sample's contents."""
    size, marks = batch_size(*batch), [0] * batch_size(*batch)
    for leaf in pytree.tree_leaves(tuple(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size:
            flat = leaf.detach().cpu().contiguous().reshape(size, leaf[0].numel())
            rows = flat.view(torch.uint8).numpy()
            marks = [zlib.crc32(row.tobytes(), mark) for row, mark in zip(rows, marks, strict=True)]
    return marks


def taken(batch: Given, rows: Tensor) -> Given:
    """Some samples of a batch, bool (samples,); tensors without a batch axis stay."""

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)] if tensor.dim() and tensor.shape[0] == len(rows) else tensor

    return Given(*map_tensors(batch, take))
