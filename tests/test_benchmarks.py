"""What the benchmarks' commands are made of; the commands themselves take minutes."""

from __future__ import annotations

import importlib
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablations, datasets, generate
from benchmarks.lib import mixed
from benchmarks.lib.data import Split, load_digits, load_letters, load_mnist
from benchmarks.lib.machine import Bounds, in_fresh_process
from benchmarks.lib.merges import in_order
from benchmarks.lib.models import Autoencoder
from benchmarks.lib.runs import BENCHMARKS, RESULTS, Kept, Row, side_by_side
from benchmarks.lib.tables import shown
from benchmarks.lib.training import augment
from fxzip.matching import match

# ---- data


def test_letters_are_the_same_each_time_and_standardised() -> None:
    train, test = load_letters(16, (60, 20))
    again, _ = load_letters(16, (60, 20))
    assert train.images.shape == (60, 3, 16, 16)
    assert test.images.shape == (20, 3, 16, 16)
    assert torch.equal(train.images, again.images)
    assert train.labels.min() >= 0
    assert train.labels.max() < 26
    assert train.images.mean((0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-5)
    assert train.images.std((0, 2, 3)) == pytest.approx([1, 1, 1], abs=1e-4)


def test_letters_can_be_told_from_their_ground() -> None:
    images = load_letters(32, (30, 1), standardise=False)[0].images
    assert images.min() >= 0
    assert images.max() <= 1
    spread = images.sum(1).flatten(1)
    assert (spread.amax(1) - spread.amin(1)).min() > 0.5


def test_digits_are_split_once() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train, test = load_digits(16)
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 16, 16)
    assert len(train.labels) == len(train.images)


def test_mnist_gets_a_border_and_three_channels(tmp_path: Path) -> None:
    images, labels = np.full((2, 28, 28), 255, np.uint8), np.arange(2, dtype=np.uint8)
    parts = {f"{part}_images": images for part in ("train", "test")}
    np.savez(tmp_path / "mnist.npz", **parts, train_labels=labels, test_labels=labels)
    train, _ = load_mnist(tmp_path, 16, standardise=False)
    assert train.images.shape == (2, 3, 16, 16)
    assert train.images[0, 0, 0].sum() == 0
    assert train.images[0, :, 8, 8].tolist() == [1, 1, 1]
    assert train.labels.tolist() == [0, 1]


def test_augment_without_flips_only_shifts() -> None:
    ramp = torch.arange(16.0).expand(50, 3, 16, 16)
    moved = augment(ramp, flip=False, border="replicate")
    assert moved.shape == ramp.shape
    assert (moved.diff(dim=3) >= 0).all()
    assert not torch.equal(moved, ramp)
    assert (augment(ramp).diff(dim=3)[:, :, 8, 4:-4] < 0).any()


# ---- results


def test_kept_rows_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    kept = Kept(path, {"command": "do it"}, keys=("cut", "method"))
    kept.extend(iter([{"cut": "full", "method": "zip", "average": 1.5}]))
    again = Kept(path, {"command": "do it again"}, keys=("cut", "method"))
    assert again.rows == kept.rows
    assert ("full", "zip") in again
    assert ("full", "permute") not in again
    again.extend([{"cut": "full", "method": "permute", "average": 2.5}])
    assert Kept(path, {"command": "do it"}, keys=("cut", "method"), same=("command",)).rows == []  # another one did it
    found = json.loads(path.read_text())
    assert found["command"] == "do it again"
    assert [row["method"] for row in found["rows"]] == ["zip", "permute"]


def test_shown_rows_keep_to_their_columns() -> None:
    table = shown([{"method": "zip", "average": 80.04, "merge_s": 3}, {"method": "ensemble", "merge_s": 0}], "all")
    assert [column.header for column in table.columns] == ["method", "average", "merge, s"]
    assert list(table.columns[1].cells) == ["80.04", "-"]


def score_row(models: str, method: str, **scores: float) -> dict[str, object]:
    average = sum(scores.values()) / len(scores)
    return {
        "models": models, "cut": "full", "method": method, "flops": 1.0, "seconds": 2.0, "scores": scores,
        "average": average,
    }  # fmt: skip


def test_the_tables_of_datasets() -> None:
    assert datasets.groups(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert datasets.groups(["a", "b"]) == [("a", "b")]
    rows = [score_row("a + b", "zip", a=90, b=80), score_row("a + c", "zip", a=70, c=60)]
    found = datasets.summary([*rows, score_row("a + b + c", "zip", a=1, b=2, c=6)])
    line = {"cut": "full", "method": "zip", "a + b": "90.0 / 80.0", "a + c": "70.0 / 60.0", "average": 75.0}
    assert found["Pairs"] == [line | {"FLOPs": 1.0, "merge_s": 2.0}]
    line = {"cut": "full", "method": "zip", "a": 1, "b": 2, "c": 6, "average": 3.0}
    assert found["All at once"] == [line | {"FLOPs": 1.0, "merge_s": 2.0}]


def test_rows_stand_in_the_order_of_the_methods_not_of_measuring() -> None:
    rows = [{"cut": c, "method": m} for c, m in [("full", "zip"), ("full", "permute"), ("none", "ensemble")]]
    assert in_order(rows, ["full"], ["permute", "zip"]) == rows[::-1]


def test_the_table_of_generate() -> None:
    assert generate.decibels(0.01) == pytest.approx(20)
    assert generate.decibels(0.0) < 101
    (line,) = generate.summary([score_row("a + b", "zip", a=0.01, b=0.1)])
    assert line["a, MSE"] == 0.01
    assert line["a, PSNR in dB"] == 20.0
    assert line["b, PSNR in dB"] == 10.0


def test_each_merge_of_the_ablations_is_made_once() -> None:
    wanted = ablations.merges(ablations.TABLES)
    assert len(set(wanted)) == len(wanted)
    assert ablations.Merge() in wanted
    observed = [(merge.images, merge.points) for merge in wanted]
    assert observed == sorted(observed)  # so that each is observed once
    rows = [asdict(merge) | {"average": 80.04, "correlation": 0.5, "seconds": 3.0} for merge in wanted[1:]]
    tables = ablations.summary(rows)
    assert list(tables) == list(ablations.TABLES)
    missing = [v for lines in tables.values() for line in lines for v in line.values() if v is None]
    assert len(missing) == 1
    assert tables["Ridge of the refit"][0] == {"changed": "1e-05", "with refit": 80.0}


def test_without_merges_inside_a_model_alpha_changes_nothing() -> None:
    similarity = torch.corrcoef(
        torch.randn(20, 12).double() @ torch.randn(12, 40).double() @ torch.randn(40, 200).double()
    )
    maps = [match("zip", similarity, alpha=alpha, beta=0.0).assignment for alpha in ablations.ALPHAS]
    assert all(torch.equal(found, maps[0]) for found in maps)


# ---- merging


@pytest.fixture
def tiny() -> dict[str, mixed.Source]:
    split = Split(torch.rand(32, 3, 16, 16), torch.zeros(32, dtype=torch.int64))
    return {name: mixed.Source(Autoencoder(4).eval(), split, split.first(8)) for name in ("one", "two")}


def test_measure_gives_what_is_missing(tiny: dict[str, mixed.Source], tmp_path: Path) -> None:
    kept = Kept(tmp_path / "rows.json", {}, keys=("models", "cut", "method"))
    names = ("average", "permute + refit")
    kept.extend(mixed.measure(tiny, 20, generate.CUTS, names, generate.error, kept))
    assert [(row["cut"], row["method"]) for row in kept.rows] == [
        ("none", "ensemble"), *((cut, name) for cut in generate.CUTS for name in names)
    ]  # fmt: skip
    assert kept.rows[0]["flops"] == 2
    assert all(1 < row["flops"] < 2 for row in kept.rows[1:])
    assert all(list(row["scores"]) == ["one", "two"] for row in kept.rows)
    assert list(mixed.measure(tiny, 20, generate.CUTS, names, generate.error, kept)) == []


def test_the_picture_of_generate(tiny: dict[str, mixed.Source]) -> None:
    rows = generate.strips(tiny, 20, each=3)
    assert list(rows) == ["input", "own network", *generate.DRAWN]
    sheet = generate.picture(rows, list(tiny), scale=2)
    assert sheet.height > len(rows) * 32
    assert sheet.width > 6 * 32
    assert len(sheet.getcolors(sheet.width * sheet.height) or []) > 100


# ---- commands

COMMANDS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    said = capsys.readouterr().out
    assert str(module.__doc__).splitlines()[0] in said
    if (RESULTS / f"{name}.json").exists() and "--json" in said:
        assert f"results/{name}.json" in "".join(said.split())


def test_benchmarks_stand_without_the_tests() -> None:
    paths = list(BENCHMARKS.rglob("*.py"))
    assert len(paths) > len(COMMANDS)
    assert [
        path.name for path in paths if re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE)
    ] == []


# ---- processes


def test_a_fresh_process_gives_the_value_and_its_peak_memory() -> None:
    ended = in_fresh_process(math.factorial, 5)
    assert ended.result() == 120
    assert ended.peak_bytes > 2**20
    assert not ended.stopped


def test_what_goes_wrong_in_a_fresh_process_is_told() -> None:
    ended = in_fresh_process(math.factorial, -5)
    assert "not defined for negative values" in (ended.error or "")
    with pytest.raises(RuntimeError, match="exit status 1"):
        ended.result()


def test_a_process_that_exceeds_a_bound_is_stopped() -> None:
    for bounds, why in ((Bounds(seconds=0.2), "more than 0.2 s"), (Bounds(mebibytes=1), "more than 1 MiB")):
        ended = in_fresh_process(time.sleep, 60, bounds=bounds)
        assert ended.stopped
        assert ended.error == why


def squares(first: int, count: int) -> Iterator[Row]:
    for number in range(first, first + count):
        if number < 0:
            raise ValueError(f"{number} is below 0")
        yield {"number": number, "square": number**2}


def test_rows_come_from_several_processes() -> None:
    found = list(side_by_side([(0, 3), (10, 2), (20, 0)], squares, jobs=2))
    assert sorted(row["square"] for row in found) == [0, 1, 4, 100, 121]
    assert not list(side_by_side([], squares, jobs=1))


def test_what_goes_wrong_in_a_process_is_raised() -> None:
    rows = side_by_side([(2, 1), (-1, 1)], squares, jobs=2)
    with pytest.raises(ValueError, match="-1 is below 0"):
        list(rows)
