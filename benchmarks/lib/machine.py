"""The machine: what it is, how long something takes on it, and fresh processes whose memory is bounded and read."""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def facts(benchmark: str, threads: int, *packages: str) -> dict[str, Any]:
    """What a file of results says of itself: command, versions (of these packages, too), machine and threads."""
    versions = {name: str(importlib.import_module(name).__version__) for name in ("torch", *packages)}
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "threads": threads,
    }


class Stopwatch:
    """Seconds since it was made, by the clock and of the processor (of which a busy machine changes little)."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def timed(run: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds by the clock, seconds of the processor, and the result."""
    watch = Stopwatch()
    result = run()
    return *watch(), result


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    # not ru_maxrss: a child process starts from its parent's peak
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


@dataclass(frozen=True)
class Bounds:
    """What a process may take."""

    seconds: float = inf
    mebibytes: float = inf


@dataclass(frozen=True)
class Ended(Generic[T]):
    """How a process ended.

    Attributes:
        value: What the function gave; None where there is an error.
        peak_bytes: The process's peak resident size when the function returned.
        error: Why there is no value, with the end of what was said on stderr.
        stopped: Whether a bound was exceeded.
    """

    value: T | None = None
    peak_bytes: int = 0
    error: str | None = None
    stopped: bool = False

    def result(self) -> T:
        """The value.

        Raises:
            RuntimeError: There is none.
        """
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.value  # type: ignore[return-value]


def in_fresh_process(
    function: Callable[..., T],
    *arguments: Any,
    threads: int = 1,
    bounds: Bounds | None = None,
    preload: Sequence[str] = (),
) -> Ended[T]:
    """Call a function in a process of its own, so that neither its memory nor its end is ours.

    Args:
        function: A function of a module.
        arguments: Of the function; they and the result are pickled.
        threads: That it computes on.
        bounds: The process is killed where it exceeds them; default: there are none.
        preload: Modules that are imported once, in a server that processes are then forked from, so that they start at
            once; without any the process starts as a new Python does.
    """
    context = get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # libraries read it when the process loads them
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as said, receiver:
        process = context.Process(target=_work, args=(sender, said.name, threads, function, arguments))
        process.start()
        sender.close()  # so that the end of the process is the end of what comes
        try:
            why = _exceeded(process, receiver, bounds or Bounds())
            return Ended(error=why, stopped=True) if why else Ended(*receiver.recv())
        except EOFError:
            process.join()
            words = Path(said.name).read_text(errors="replace")[-1000:]
            return Ended(error=f"exit status {process.exitcode}: {words}")
        finally:
            process.kill()  # it has nothing left to do
            process.join()


def _work(
    sender: Connection, said: str, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """In the new process: what is said on stderr goes to a file, on stdout nowhere."""
    os.dup2(os.open(said, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(threads)
    value = function(*arguments)
    sender.send((value, peak_bytes()))


def _exceeded(process: BaseProcess, receiver: Connection, bounds: Bounds) -> str | None:
    """Wait until something comes, or the process ends; which bound it exceeded before, if it did."""
    start = time.monotonic()
    while not receiver.poll(0.1):
        if time.monotonic() - start > bounds.seconds:
            return f"more than {bounds.seconds:g} s"
        if _resident(process.pid or 0) > bounds.mebibytes:
            return f"more than {bounds.mebibytes:g} MiB"
    return None


def _resident(pid: int) -> int:
    """Resident memory of a process in MiB, 0 where it cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
