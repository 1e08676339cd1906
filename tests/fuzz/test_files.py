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


def test_a_hundred_changed_folders(tmp_path: Path) -> None:
    tally = Tally()
    fuzz(iter(range(100)), tally, tmp_path, time.monotonic() + 120)
    assert tally.next == 100, tally
    assert not tally.findings, tally
    assert tally.counts["refused"] > 50, tally
    assert tally.counts["loaded"] > 3, tally
    assert tally.counts["does not run"] < 10, tally


def test_a_number_is_the_same_change_each_time(tmp_path: Path) -> None:
    sources = seeds(tmp_path / "seeds")
    for number in range(20):
        found = [{p.name: p.read_bytes() for p in changed(sources, number, tmp_path).iterdir()} for _ in range(2)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda place: (place.parent / "canary").touch(), "CODE"),
        (lambda place: Path("/tmp/fxzip-fuzz").write_text(""), "CODE"),
        (lambda place: 1 / 0, "RAW"),
        (lambda place: files.os.abort(), "DIED"),
        (lambda place: files.time.sleep(5), "DIED"),
        (lambda place: bytearray(6 << 30), "RAW"),
    ],
)
def test_what_must_be_found_is_found(body, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A fault at the third folder: it is noted, and the others are tried all the same."""
    calls = {"count": 0}
    load = files.fxzip.load

    def faulty(place: Path):  # type: ignore[no-untyped-def]
        plan = json.loads((place / io.PLAN).read_text())
        if plan.pop("fault", None):
            body(place)
        return load(place)

    def simple(sources: list[Path], number: int, folder: Path) -> Path:
        plan = json.loads((sources[0] / io.PLAN).read_text())
        calls["count"] += 1
        place = folder / "changed"
        place.mkdir(exist_ok=True)
        if number == 2:
            plan["fault"] = True
        (place / io.PLAN).write_text(json.dumps(plan))
        return place

    monkeypatch.setattr(files.fxzip, "load", faulty)
    monkeypatch.setattr(files, "changed", simple)
    monkeypatch.setattr(files, "SECONDS", 1)
    tally = Tally()
    fuzz(iter(range(4)), tally, tmp_path, time.monotonic() + 60)
    assert tally.next == 4
    assert list(tally.findings) == [2, 3] if (tmp_path / "canary").exists() else [2]
    assert tally.findings[2].startswith(kind)
