"""`Bar`: one line on stderr that says what goes on, how far it is, how long it will take, and the memory it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class Bar:
    """A bar that runs through the phases of one piece of work; the time that it shows at the end is that of all."""

    def __init__(self) -> None:
        # A console of its own: a live display that a caller holds on another console does not refuse it.
        columns = TextColumn("{task.description}"), BarColumn(), _Count(), _Left(), TimeElapsedColumn(), _Memory()
        self._shown = Progress(*columns, console=Console(stderr=True), transient=True)
        self._whole = self._shown.add_task("", total=None)

    def phase(self, description: str, total: int | None = None) -> None:
        """Begin something else.

        Args:
            description: What, in words.
            total: How many steps it has; None: nobody knows.
        """
        task = self._shown.tasks[0]
        self._shown.update(self._whole, description=description, completed=0, since=task.elapsed or 0.0)
        task.total = total  # update takes None for no change
        self._shown.refresh()

    def advance(self) -> None:
        """A step is done."""
        self._shown.advance(self._whole)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show it; afterwards it is gone."""
        with self._shown:
            yield


Shown: TypeAlias = bool | Bar
"""Whether to show progress: on a bar of its own, or on one that is there."""


@contextmanager
def bar_of(progress: Shown) -> Iterator[Bar | None]:
    """The bar to show progress on: the one that is there, or a new one for this block; None where none is wanted."""
    if isinstance(progress, Bar):
        yield progress
    elif not progress:
        yield None
    else:
        bar = Bar()
        with bar.open():
            yield bar


class _Count(ProgressColumn):
    """Steps that are done, of how many."""

    def render(self, task: Task) -> Text:
        """As ``12/55``, or nothing."""
        return Text("" if task.total is None and not task.completed else f"{task.completed:g}/{task.total or '?'}")


class _Left(ProgressColumn):
    """The time that is left in a phase, by how long its steps took so far."""

    def render(self, task: Task) -> Text:
        """As ``0:01:30 left``, or nothing."""
        spent = (task.elapsed or 0.0) - task.fields.get("since", 0.0)
        if not task.total or not task.completed:
            return Text("")
        seconds = round(spent / task.completed * (task.total - task.completed))
        return Text(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left")


class _Memory(ProgressColumn):
    """The memory that this process takes."""

    def render(self, task: Task) -> Text:
        """As ``1.2 GB``; nothing where the system does not say."""
        with suppress(OSError, IndexError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return Text(f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB")
        return Text("")
