"""`Journal`: what a merge has done so far, in a folder, so that it goes on there after an interruption.

Kept are the sums of moments every so often while images are observed, then what was observed, what each short fit gave,
and the weights of each layer that was solved. All that lies between is computed again: the same steps on the same
images give the same bits.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.stores import read_store, write_store
from fxzip.errors import CalibrationError, OptionError, SaveError
from fxzip.fidelity import Answer, Depth, Fidelity
from fxzip.fingerprint import marked
from fxzip.folders import write_file
from fxzip.observer import Observer
from fxzip.processes import ALONE, Processes

EVERY = 30.0
"""Seconds between two times that the sums of moments are written."""
RUN = "run.json"


@dataclass(frozen=True, eq=False)
class Journal:
    """A folder of what was done.

    Attributes:
        folder: The folder; None: nothing is kept.
        processes: Those that share the merge. The first one reads and writes for all, but each keeps its own sums.
    """

    folder: Path | None = None
    processes: Processes = ALONE

    @classmethod
    def open(
        cls, folder: str | PathLike[str] | None, run: Callable[[], Mapping[str, str]], processes: Processes
    ) -> Journal:
        """The journal of a run, begun or taken up again.

        Args:
            folder: The folder; None: none is kept.
            run: Tells what the run depends on: it must be the same when it goes on.
            processes: Those that share the merge.

        Raises:
            OptionError: The folder holds another run, or other files.
            SaveError: It cannot be written to.
        """
        if folder is None:
            return NONE
        path = Path(folder)
        depends = {**run(), "processes": str(processes.count)}
        processes.agreed("opening the folder to resume from", lambda: _begin(path, depends))
        return cls(path, processes)

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What was kept under a name, for all processes; None where nothing was."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.safetensors"
        return self.processes.agreed("resuming", lambda: read_store(path) if path.is_file() else None)

    def keep(self, name: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Keep tensors and plain values under a name."""
        if self.folder is not None and self.processes.leads:
            write_store(self.folder / f"{name}.safetensors", tensors, values)

    def fidelity(self, what: str, find: Callable[[], Fidelity | None]) -> Fidelity | None:
        """What a short fit gave, found now or before.

        Args:
            what: Which fit.
            find: Makes it.
        """
        name = f"short-{zlib.crc32(what.encode()):08x}"
        known = self.read(name)
        if known is not None:
            return _fidelity(known[1])
        found = find()
        self.keep(name, {}, None if found is None else asdict(found))
        return found

    def close(self) -> None:
        """Take the files away: the run has come to its end."""
        if self.folder is None or not self.processes.leads:
            return
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob(".*.part"), self.folder / RUN):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


NONE = Journal()
"""Nothing is kept."""


def _begin(folder: Path, run: Mapping[str, str]) -> None:
    """Make the folder, or raise unless what is there is this run."""
    known = folder / RUN
    if not known.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError(f"resume={str(folder)!r}: it holds other files; give a new folder, or an empty one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"{folder} cannot be made: {error.strerror}") from error
        write_file(known, json.dumps(run, indent=1).encode())
        return
    try:
        before = dict(json.loads(known.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"resume={str(folder)!r}: {RUN} cannot be read ({error}); remove the folder") from error
    for name in {**before, **run}:
        if before.get(name) != run.get(name):
            raise OptionError(
                f"resume={str(folder)!r}: the run that began there had {name} {before.get(name)}, now it is "
                f"{run.get(name)}; go on with the same, or give another folder"
            )


def _fidelity(values: Any) -> Fidelity | None:
    """What `asdict` made of it, through JSON."""
    if values is None:
        return None
    answers = tuple(Answer(**answer) for answer in values["answers"])
    depths = (Depth(depth["name"], depth["node"], tuple(depth["unexplained"])) for depth in values["depths"])
    return Fidelity(values["images"], values["fitted"], answers, tuple(depths))


class Watch:
    """Keeps this process's sums of moments every so often, and passes over the batches that are in them already."""

    def __init__(self, journal: Journal, observers: Sequence[Observer]) -> None:
        """Take up what was kept before.

        Args:
            journal: Where it is kept.
            observers: What gathers the moments.
        """
        assert journal.folder is not None
        self._path = journal.folder / f"observing-{journal.processes.rank}.safetensors"
        self._observers = observers
        self._read = self._before = self._mark = self._known = 0
        self._written = time.monotonic()
        if self._path.is_file():
            tensors, values = read_store(self._path)
            self._before, self._known = values["batches"], values["mark"]
            for number, (observer, count) in enumerate(zip(observers, values["counts"], strict=True)):
                if count:
                    observer.restore(count, tensors[f"mean.{number}"], tensors[f"scatter.{number}"])

    def passes_over(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the next batch was observed before.

        Raises:
            CalibrationError: Those that were are others than these.
        """
        self._read += 1
        for leaf in pytree.tree_leaves((args, dict(kwargs))):
            if isinstance(leaf, Tensor):
                self._mark = marked(leaf, self._mark)
        if self._read == self._before and self._mark != self._known:
            raise CalibrationError(
                "resume: the loader gives other images than before the interruption; it must give them in the same "
                "order each time (shuffle=False, or a seed). To start anew, remove the folder"
            )
        return self._read <= self._before

    def observed(self) -> None:
        """Say that the batch was observed; from time to time all is written."""
        if time.monotonic() - self._written < EVERY:
            return
        tensors: dict[str, Tensor] = {}
        counts = []
        for number, observer in enumerate(self._observers):
            count, mean, scatter = observer.state
            counts.append(count)
            if mean is not None and scatter is not None:
                tensors |= {f"mean.{number}": mean, f"scatter.{number}": scatter}
        write_store(self._path, tensors, {"batches": self._read, "mark": self._mark, "counts": counts})
        self._written = time.monotonic()

    def close(self) -> None:
        """Take the file away."""
        self._path.unlink(missing_ok=True)
