"""Results of benchmarks: where they are, rows that are kept as they come, from several processes if need be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Manager, get_context
from pathlib import Path
from queue import Empty
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
CHECKPOINTS = BENCHMARKS / "checkpoints"

Row = dict[str, Any]


class Kept:
    """The rows of a file of results, written as they come, so that a run can be taken up again.

    Attributes:
        rows: All that are there.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], keys: Sequence[str], same: Sequence[str] = ()) -> None:
        """Read what is there.

        Args:
            path: The file.
            facts: What stands in it beside the rows.
            keys: What tells a row from the others.
            same: Which of the facts rows depend on: where one was another, the rows that are there do not count.
        """
        self._path, self._facts, self._keys = path, dict(facts), tuple(keys)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        kept = all(found.get(name) == facts[name] for name in same)
        self.rows: list[Row] = found["rows"] if kept else []

    def __contains__(self, key: object) -> bool:
        """Whether there is a row with these values of the keys."""
        return any(tuple(row[name] for name in self._keys) == key for row in self.rows)

    def extend(self, rows: Iterable[Row]) -> None:
        """Take rows as they come, and tell of each."""
        for row in rows:
            self.rows.append(row)
            write(self._path, {**self._facts, "rows": self.rows})
            told = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(", ".join(told), flush=True)


def side_by_side(calls: Sequence[tuple[Any, ...]], function: Callable[..., Iterable[Row]], jobs: int) -> Iterator[Row]:
    """The rows that a function gives for each tuple of arguments, as they come, from so many processes at a time."""
    with Manager() as manager, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        queue = manager.Queue()
        running = [pool.submit(_put_rows, queue, function, arguments) for arguments in calls]
        # in this order: when all are done, all that they gave is in the queue
        while not all(future.done() for future in running) or not queue.empty():
            try:
                yield queue.get(timeout=1)
            except Empty:
                continue
        for future in running:
            future.result()  # raises what went wrong


def _put_rows(queue: Any, function: Callable[..., Iterable[Row]], arguments: tuple[Any, ...]) -> None:
    for row in function(*arguments):
        queue.put(row)


def write(path: Path, found: Mapping[str, Any] | Sequence[Row]) -> None:
    """Write a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
