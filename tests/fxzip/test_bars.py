"""One line of progress for the whole of a merge."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import fxzip
from fxzip.data import bars
from fxzip.errors import OptionError
from tests.fxzip.test_leftovers import X, net


def test_one_bar_tells_every_phase_and_the_tasks_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Told] = []

    class Told(bars.Bar):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            self.told: list[str] = []
            self.steps = 0

        def phase(self, description: str, total: int | None = None) -> None:
            super().phase(description, total)
            self.told.append(description)

        def advance(self) -> None:
            super().advance()
            self.steps += 1

    monkeypatch.setattr(bars, "Bar", Told)
    fxzip.zip(net(0), net(1), [X[:12], X[12:]], names=["cats", "birds"])
    (bar,) = made
    heads = ["refitting the head of cats", "refitting the head of birds"]
    first = ["tracing and analysing", "observing", "choosing a method", "checking the merge"]
    assert bar.told == [*first, "refitting the trunk", *heads, "comparing"]
    assert bar.steps > 5


def test_what_a_bar_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, clock = bars.Bar(), [100.0]
    progress = Progress(*bar._shown.columns, console=Console(file=io.StringIO(), width=120), get_time=lambda: clock[0])
    bar._shown, bar._whole = progress, progress.add_task("", total=None)

    def shown() -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(progress.make_tasks_table(progress.tasks))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    bar.phase("tracing")
    assert "tracing" in shown()
    assert "left" not in shown()
    clock[0] += 60
    bar.phase("observing", 55)
    clock[0] += 12
    for _ in range(12):
        bar.advance()
    assert "12/55" in shown()
    assert "0:00:43 left" in shown()  # a second each, of this phase alone
    assert "0:01:12" in shown()
    assert " GB" in shown()
    bar.phase("comparing")
    assert "/" not in shown()


def test_progress_is_yes_or_no() -> None:
    with pytest.raises(OptionError, match="progress=1: give True or False"):
        fxzip.zip(net(0), net(1), [torch.ones(2, 3, 4, 4)], progress=1)
