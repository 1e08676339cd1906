"""A hundred changed folders: loaded or refused, within bounds, and no code runs; and the test itself can fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fxzip import io
from tests.fuzz import files
from tests.fuzz.changes import changed, seeds
from tests.fuzz.files import Tally, fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that what the changes begin with is made once."""
    return tmp_path_factory.mktemp("files")


def test_a_hundred_changed_folders(folder: Path) -> None:
    tally = Tally()
    fuzz(iter(range(100)), tally, folder, time.monotonic() + 120)
    assert tally.next == 100, tally
    assert not tally.findings, tally
    assert tally.counts["refused"] > 50, tally
    assert tally.counts["loaded"] > 1, tally
    assert tally.counts["does not run"] < 10, tally


def test_a_number_is_the_same_change_each_time(folder: Path) -> None:
    sources = seeds(folder / "seeds")
    for number in range(20):
        found = [{p.name: p.read_bytes() for p in changed(sources, number, folder).iterdir()} for _ in range(2)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda place: (place.parent / "canary").touch(), "CODE"),
        (lambda place: Path("/tmp/fxzip-fuzz").write_text(""), "CODE"),
        (lambda place: 1 / 0, "RAW"),
        (lambda place: files.os.abort(), "DIED"),
        (lambda place: files.time.sleep(60), "DIED"),
        (lambda place: bytearray(6 << 30), "RAW"),
    ],
)
def test_what_must_be_found_is_found(body, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A fault at the third folder: it is noted, and the others are tried all the same."""
    load = files.fxzip.load

    def faulty(place: Path):  # type: ignore[no-untyped-def]
        plan = json.loads((place / io.PLAN).read_text())
        if plan.pop("fault", None):
            body(place)
        return load(place)

    def simple(sources: list[Path], number: int, folder: Path) -> Path:
        plan = json.loads((sources[0] / io.PLAN).read_text())
        place = folder / "changed"
        place.mkdir(exist_ok=True)
        if number == 2:
            plan["fault"] = True
        (place / io.PLAN).write_text(json.dumps(plan))
        return place

    monkeypatch.setattr(files.fxzip, "load", faulty)
    monkeypatch.setattr(files, "changed", simple)
    monkeypatch.setattr(files, "SECONDS", 4)
    tally = Tally()
    fuzz(iter(range(4)), tally, folder, time.monotonic() + 60)
    assert tally.next == 4
    assert list(tally.findings) == [2]
    assert tally.findings[2].startswith(kind)
