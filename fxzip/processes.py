"""`Processes`: those that share one merge, by torch.distributed; alone, everything stays as it is.

Each process reads its share of the images and takes sums over them. What is decided is decided from sums over all
processes, or by the first one for all, so that every process goes the same way and ends with the same bits.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxzip.errors import FxzipError, ProcessError

_T = TypeVar("_T")

Total = Callable[[str, Sequence[Tensor] | None], list[Tensor]]
"""Sums over processes that have other samples: `Processes.total`, of ``ALONE`` or of several."""
BUCKET = 2**25
"""Elements (of 8 bytes) that are summed in one go."""
_HEADER = 64
"""Numbers in front of each sum: where in the work it belongs, and the shapes of what is summed."""


class Processes:
    """One process alone: its sums are those of all.

    Attributes:
        rank: Which process this is.
        count: How many there are.
        traffic: Bytes that were summed over the processes, or handed out by the first, by what for.
    """

    rank, count = 0, 1

    def __init__(self) -> None:
        self.traffic: Counter[str] = Counter()

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files, shows progress and warns."""
        return self.rank == 0

    def total(self, what: str, parts: Sequence[Tensor] | None, device: torch.device | None = None) -> list[Tensor]:
        """Sums over the processes, in float64; alone, the tensors as they are.

        Args:
            what: What for, in words.
            parts: The same number of tensors in each process, of the same shapes; None where a process has no images
                that it could take them of.
            device: Where the sums go in a process that has none.

        Raises:
            ProcessError: Another process has ended, does not answer, or is somewhere else.
        """
        assert parts is not None
        return list(parts)

    def numbers(self, what: str, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the processes."""
        return values

    def agreed(self, what: str, find: Callable[[], _T]) -> _T:
        """What the first process finds; the others get a copy, its tensors on the CPU.

        Raises:
            ProcessError: As `total`; or the first process failed.
        """
        return find()

    def everywhere(self, what: str, value: _T) -> list[_T]:
        """The values of all processes, small ones, in their order."""
        return [value]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What fails inside in one process raises in all of them, at the end of the block."""
        yield

    def hush(self) -> None:
        """Let only the first process warn, until the filters of warnings are put back."""
        if not self.leads:
            warnings.simplefilter("ignore", UserWarning)


class Several(Processes):
    """The processes of a group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take a group; None: that of all processes."""
        super().__init__()
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._first = 0 if group is None else dist.get_global_rank(group, 0)
        cpu = "gloo" in str(dist.get_backend_config(group))
        self._device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
        self._serial = 0

    def total(self, what: str, parts: Sequence[Tensor] | None, device: torch.device | None = None) -> list[Tensor]:
        """Sums over the processes, on the device of each tensor, with the same bits in all processes."""
        shapes = self._shapes(what, parts)
        if parts is None:
            parts = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        elif shapes and shapes != [tuple(part.shape) for part in parts]:
            raise ProcessError(f"{what}: the processes have tensors of different shapes; are the models the same?")
        found: list[Tensor] = []
        for bucket in runs(parts, lambda part: part.numel(), BUCKET):
            flat = torch.cat([part.to(self._device, torch.float64).reshape(-1) for part in bucket])
            with self._answered(what):
                dist.all_reduce(flat, group=self._group)
            self.traffic[what] += flat.nbytes
            pieces = flat.split([part.numel() for part in bucket])
            found += [piece.reshape(part.shape).to(part.device) for piece, part in zip(pieces, bucket, strict=True)]
        return found

    def _shapes(self, what: str, parts: Sequence[Tensor] | None) -> list[tuple[int, ...]]:
        """The shapes of what is summed, also where a process has nothing; empty where they are too many to tell.

        All processes must be at the same place in the work.
        """
        self._serial += 1
        here = zlib.crc32(f"{self._serial} {what}".encode())
        told = [n for part in parts or () for n in (part.dim() + 1, *part.shape)]
        header = torch.zeros(_HEADER, dtype=torch.int64)
        header[:2] = torch.tensor([here, -here])
        if len(told) <= _HEADER - 2:
            header[2 : len(told) + 2] = torch.tensor(told, dtype=torch.int64)
        header = header.to(self._device)
        with self._answered(what):
            dist.all_reduce(header, dist.ReduceOp.MAX, group=self._group)
        most, least, *given = header.tolist()
        if most != here or -least != here:
            raise ProcessError(
                f"{what}: the {self.count} processes are at different places in the work; call the same functions "
                "of fxzip with the same models and options in each"
            )
        found = []
        while given and given[0]:
            dims, given = given[0] - 1, given[1:]
            found.append(tuple(given[:dims]))
            given = given[dims:]
        return found

    def numbers(self, what: str, *values: float) -> tuple[float, ...]:
        """Sums of numbers over the processes."""
        return tuple(self.total(what, [torch.tensor(values, dtype=torch.float64)])[0].tolist())

    def agreed(self, what: str, find: Callable[[], _T]) -> _T:
        """What the first process finds."""
        failed: Exception | None = None
        box: list[Any] = [None, ""]
        if self.leads:
            try:
                box[0] = _on_cpu(find())
            except Exception as error:
                failed, box[1] = error, f"{type(error).__name__}: {error}"
        with self._answered(what):
            dist.broadcast_object_list(box, self._first, group=self._group, device=self._device)
        self.traffic[what] += _size(box[0])
        if failed is not None:
            raise failed
        if box[1]:
            raise ProcessError(f"{what} failed in process 0: {box[1]}")
        found: _T = box[0]
        return found

    def everywhere(self, what: str, value: _T) -> list[_T]:
        """The values of all processes."""
        found: list[Any] = [None] * self.count
        with self._answered(what):
            dist.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What fails inside in one process raises in all of them."""
        failed: Exception | None = None
        try:
            yield
        except ProcessError:
            raise  # the others know, or cannot be told
        except Exception as error:
            failed = error
        texts = self.everywhere(what, None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        wrong = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if wrong:
            raise ProcessError(f"{what} failed in process {wrong[0][0]} of {self.count}: {wrong[0][1]}")

    @contextmanager
    def _answered(self, what: str) -> Iterator[None]:
        """Say in the user's words that a process is gone, or too late."""
        try:
            yield
        except FxzipError:
            raise
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ProcessError(
                f"{what}: another of the {self.count} processes has ended, or did not answer within the group's "
                f"timeout (init_process_group(timeout=...)); its own message says why. This is process {self.rank}; "
                f"torch.distributed says: {reason}"
            ) from error


ALONE = Processes()
"""One process."""


def processes_of(group: Any = None) -> Processes:
    """The processes that share a merge.

    Args:
        group: A process group of torch.distributed. None: all processes, where one was initialised or ``torchrun``
            started several; or this one alone. False: this one alone.

    Raises:
        ProcessError: It is no group, or this process is not in it.
    """
    if group is False or not dist.is_available():
        return ALONE
    if group is None:
        if not dist.is_initialized() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _start()
        return Several() if dist.is_initialized() and dist.get_world_size() > 1 else ALONE
    if not isinstance(group, dist.ProcessGroup):
        raise ProcessError(
            f"process_group={group!r}: give a group of torch.distributed, None for all processes, or False for none"
        )
    if dist.get_rank(group) < 0:
        raise ProcessError("process_group: this process is not in the group that was given")
    return Several(group) if dist.get_world_size(group) > 1 else ALONE


def _start() -> None:
    """Initialise the group that torchrun's variables describe; torch ends it with the process."""
    import atexit

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def exact(count: int) -> Tensor:
    """A number of samples as what can be summed with float64."""
    return torch.tensor(count, dtype=torch.float64)


def runs(items: Iterable[_T], size: Callable[[_T], int], most: int) -> Iterator[list[_T]]:
    """The items in runs of a total size of at most ``most``; what is larger stands alone."""
    run: list[_T] = []
    for item in items:
        if run and sum(map(size, run)) + size(item) > most:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _on_cpu(value: Any) -> Any:
    """A structure whose tensors lie on the CPU."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def _size(value: Any) -> int:
    """Bytes of the tensors in a structure."""
    from torch.utils import _pytree as pytree

    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
