"""What the benchmarks' commands share: their options, and results that are kept as they come."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Manager, get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from rich.table import Table

import fxzip

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parent / "checkpoints"

Row = dict[str, Any]


def command_line(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser with ``--data``, ``--threads``, ``--bf16``, and an option for each number."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with the packed data sets, or torchvision's")
    for name, default in {**numbers, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} unless told")
    text = "train under bfloat16 autocast (the default where the CPU has instructions for it)"
    bf16 = torch.cpu._is_avx512_bf16_supported()
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help=text)
    return parser


def facts(benchmark: str, threads: int) -> Row:
    """What a file of results says of itself."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "fxzip": fxzip.__version__},
        "threads": threads,
    }


def in_order(rows: Sequence[Row], cuts: Iterable[str], names: Iterable[str]) -> list[Row]:
    """The rows by cut and method in these orders, the ensembles first, in whatever order they were measured."""
    cuts, names = ["none", *cuts], ["ensemble", *names]
    return sorted(rows, key=lambda row: (cuts.index(row["cut"]), names.index(row["method"])))


def timed_merge(prepared: fxzip.Prepared, **options: Any) -> tuple[fxzip.ZippedModel, float, float]:
    """A merge, its FLOPs in networks, and the seconds that it took."""
    start = time.perf_counter()
    zipped = prepared.convert(progress=False, **options)
    seconds = time.perf_counter() - start
    return zipped, zipped.report.flops_after / zipped.report.before[0].flops, seconds


class Kept:
    """The rows of a file of results, written as they come, so that a run can be taken up again.

    Attributes:
        rows: All that are there.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Read what is there.

        Args:
            path: The file.
            facts: What stands in it beside the rows.
            keys: What tells a row from the others.
        """
        self._path, self._facts, self._keys = path, dict(facts), tuple(keys)
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []

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


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def brief(value: object) -> str:
    """A value to print, numbers in four digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown(rows: Sequence[Row], title: str) -> Table:
    """Rows to print, a column for each key of any row."""
    result = Table(title=title)
    columns = dict.fromkeys(key for row in rows for key in row)
    for column in columns:
        result.add_column(column.replace("_", ", "), justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(*(brief(row.get(column)) for column in columns))
    return result
