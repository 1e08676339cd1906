"""Saved folders, changed at random: whatever a file says, it is loaded or refused, and never runs code.

    python -m tests.fuzz.files --count 10000 --seconds 600     # goes on where it was stopped; --again starts anew

Each number is one change of one of a few small folders: flipped bits, cut files, swapped or doubled keys, hostile
targets, names and numbers; most with hashes that are right. What loads is printed as source, run and saved again. A
worker of limited memory and time does it; its death is a finding, and another goes on with the next number.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fxzip
from fxzip import io
from fxzip.errors import FileFormatError, FxzipError
from fxzip.plan import trial
from tests.fuzz.changes import changed, seeds

STATE = Path("build/fuzz/files.json")
MEMORY = 3 << 30
"""Bytes that a worker may take beyond what Python and torch have; loading promises to stay well below."""
ALLOWED = 1 << 28
"""What stands for `fxzip.plan.trial.ALLOWED`, so that a bound that does not hold is seen on a small machine."""
SECONDS = 20
_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")


@dataclass
class Tally:
    """What became of the folders: how many, and every finding by its number."""

    next: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[int, str] = field(default_factory=dict)

    def add(self, number: int, outcome: str) -> None:
        """Note one outcome; its first word is the kind, and in capitals it is a finding."""
        kind = outcome.split(":", 1)[0]
        self.counts[kind] += 1
        if kind.isupper():
            self.findings[number] = outcome
        self.next = number + 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        findings = "".join(f"\n  {number}: {text}" for number, text in self.findings.items())
        return f"{self.next:,} folders: {counts or 'none'}; {len(self.findings)} findings{findings}"


def fuzz(numbers: Iterator[int], tally: Tally, folder: Path, until: float) -> None:
    """Try changed folders until the numbers or the time is over.

    Args:
        numbers: Which, in ascending order.
        tally: It is changed.
        folder: For the folders.
        until: When to stop, by `time.monotonic`.
    """
    sources = seeds(folder / "seeds")
    waiting = list(numbers)
    while waiting and time.monotonic() < until:
        for number, outcome in _worker(sources, waiting, folder, until):
            tally.add(number, outcome)
        waiting = [number for number in waiting if number >= tally.next]


def _worker(sources: list[Path], numbers: list[int], folder: Path, until: float) -> Iterator[tuple[int, str]]:
    """The outcomes of one worker, to the end or to its death."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(sources, numbers, folder, until, writing)
    os.close(writing)
    number, stage = numbers[0], "load"
    with os.fdopen(reading, encoding="utf-8") as lines:
        for line in lines:
            number, stage, outcome = int(line.split("\t")[0]), *line.rstrip("\n").split("\t")[1:3]
            if outcome:
                yield number, outcome
                stage = "done"
    _, status = os.waitpid(child, 0)
    if status and stage != "done":
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        what = f"no end after {SECONDS} s" if late else f"the process died with status {status}"
        yield number, f"{'slow' if late and stage == 'run' else 'DIED'}: {what} ({stage})"


def _work(sources: list[Path], numbers: list[int], folder: Path, until: float, out: int) -> None:
    """What a worker does; it does not return."""

    def say(number: int, stage: str, outcome: str = "") -> None:
        os.write(out, f"{number}\t{stage}\t{' '.join(outcome.split())[:500]}\n".encode())

    number = numbers[0]
    faulthandler.disable()  # its report of a death is long
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's is inherited
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of torch
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        trial.ALLOWED = ALLOWED
        seen = watch(folder)
        for number in numbers:
            if time.monotonic() > until:
                break
            say(number, "load")
            signal.alarm(SECONDS)
            outcome = check(changed(sources, number, folder), seen, folder, lambda stage, n=number: say(n, stage))
            signal.alarm(0)
            say(number, "done", outcome)
    except BaseException as error:
        os.write(out, f"{number}\tload\tBROKEN: {error!r}\n".encode())
    os._exit(0)


def watch(folder: Path) -> list[str]:
    """What the process does that no file should make it do: a list that grows."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            seen.append(f"{event} {args[:2]!r}")
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes and not str(args[0]).startswith((str(folder), os.devnull)):
            seen.append(f"open {args[:2]!r}")

    sys.addaudithook(hook)
    return seen


def check(place: Path, seen: list[str], folder: Path, stage: Callable[[str], None]) -> str:
    """Load one folder and use what it gives; what became of it in a line."""
    before = len(seen)
    try:
        outcome = _use(place, stage)
    except RecursionError:
        outcome = "RAW: RecursionError"
    except Exception as error:
        outcome = f"RAW: {type(error).__name__}: {error}"
    if (folder / "canary").exists() or len(seen) > before:
        outcome = f"CODE: {seen[before:]} ({outcome})"
        (folder / "canary").unlink(missing_ok=True)
    return outcome


def _use(place: Path, stage: Callable[[str], None]) -> str:
    try:
        zipped = fxzip.load(place)
    except FileFormatError as error:
        return f"refused: {error}"
    stage("run")
    for part in (zipped.trunk, *(zipped.head(name) for name in zipped.names)):
        compile(part.print_readable(print_output=False), "graph", "exec")
    text = io.model_card(zipped) + str(zipped.report)
    assert text
    try:
        with torch.no_grad():
            zipped(*zipped.example[0], **zipped.example[1]) if zipped.example else None
    except (MemoryError, RecursionError) as error:
        return f"MEMORY: {type(error).__name__} of forward: {error}"
    except Exception as error:
        short = "allocate memory" in str(error)
        return f"{'MEMORY' if short else 'does not run'}: {type(error).__name__}: {error}"
    try:
        zipped.save(place.parent / "again")
    except FxzipError as error:
        return f"not saved again: {error}"
    finally:
        shutil.rmtree(place.parent / "again", ignore_errors=True)
    return "loaded"


def read_tally(path: Path) -> Tally:
    """What earlier runs found."""
    if not path.exists():
        return Tally()
    found = json.loads(path.read_text())
    findings = {int(number): text for number, text in found["findings"].items()}
    return Tally(found["next"], collections.Counter(found["counts"]), findings)


def main() -> int:
    """The command; 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="how many in all, with those of earlier runs")
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--state", type=Path, default=STATE, help="where the tally is kept")
    parser.add_argument("--again", action="store_true", help="forget earlier runs")
    parser.add_argument("--only", type=int, help="this number only, in this process: what it gives, and where it fails")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only is not None:
            trial.ALLOWED = ALLOWED
            print(_use(changed(seeds(folder / "seeds"), given.only, folder), print))
            return 0
        tally = Tally() if given.again else read_tally(given.state)
        end = time.monotonic() + given.seconds
        while tally.next < given.count and time.monotonic() < end:
            some = range(tally.next, min(tally.next + 500, given.count))
            fuzz(iter(some), tally, folder, end)
            given.state.parent.mkdir(parents=True, exist_ok=True)
            kept = {"next": tally.next, "counts": tally.counts, "findings": tally.findings}
            given.state.write_text(json.dumps(kept, indent=1))
            print(str(tally).splitlines()[0], flush=True)
    print(tally)
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
