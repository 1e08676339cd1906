"""The demo shows what the readme says, and the command line reports errors in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fxzip import cli, demo
from fxzip.errors import CutError, FxzipError

ROW = demo.Row("low alone", 10, 20, None, (99.0, None), None)


@pytest.fixture(scope="module")
def rows() -> dict[str, demo.Row]:
    """The whole demo, once."""
    return {row.name: row for row in demo.run(progress=False)}


def test_held_out_digits_are_the_same_each_time_and_balanced() -> None:
    first, second = demo.load_digits(), demo.load_digits()
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    assert len(first.train) + len(first.test) == 1797
    assert torch.bincount(first.test.tensors[1]).min() > 50


def test_training_repeats_and_leaves_the_random_state() -> None:
    digits = demo.load_digits()
    torch.manual_seed(7)
    first = demo.train(digits, 0, seed=1, epochs=1)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    second = demo.train(digits, 0, seed=1, epochs=1)
    assert torch.equal(first.head.weight, second.head.weight)


def test_both_networks_are_well_trained(rows: dict[str, demo.Row]) -> None:
    ensemble = rows["ensemble"]
    assert min(task for task in ensemble.tasks if task is not None) > 97
    assert rows["low alone"].tasks == (ensemble.tasks[0], None)
    assert rows["high alone"].tasks == (None, ensemble.tasks[1])
    assert rows["low alone"].flops + rows["high alone"].flops == ensemble.flops


def test_a_full_zip_costs_one_network_and_a_partial_one_less_than_two(rows: dict[str, demo.Row]) -> None:
    one, two = rows["low alone"], rows["ensemble"]
    full, partial = rows["zip, full"], rows["zip, to layer2"]
    assert one.flops < full.flops < 1.01 * one.flops  # the second head
    assert full.flops < partial.flops < two.flops
    assert one.params < full.params < partial.params < two.params


def test_zip_beats_average_and_the_partial_cut_lies_between(rows: dict[str, demo.Row]) -> None:
    def average(name: str) -> float:
        value = rows[name].average
        assert value is not None
        return value

    assert average("zip, full") > average("average, full") + 10
    assert average("zip, full") < average("zip, to layer2") <= average("ensemble")


@pytest.mark.parametrize("merge", ["average", "permute", "zip"])
@pytest.mark.parametrize("cut", ["full", "to layer2"])
def test_refit_is_better_than_the_papers_rule(rows: dict[str, demo.Row], merge: str, cut: str) -> None:
    plain, refitted = rows[f"{merge}, {cut}"], rows[f"{merge} + refit, {cut}"]
    assert (refitted.average or 0) > (plain.average or 0)
    assert (refitted.joint or 0) > (plain.joint or 0)


def test_cli_prints_the_table_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "run", lambda progress: [ROW])
    done = CliRunner().invoke(cli.app, ["demo", "--quiet", "--json", str(tmp_path / "t.json")])
    assert done.exit_code == 0
    assert "low alone" in done.stdout
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "rows": [
            {
                "name": "low alone",
                "flops": 10,
                "params": 20,
                "joint": None,
                "tasks": [99.0, None],
                "average": None,
                "agrees": None,
            }
        ]
    }


def test_cli_says_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(progress: bool) -> None:
        raise CutError("no cut named\n  layer9")

    monkeypatch.setattr(demo, "run", fail)
    done = CliRunner().invoke(cli.app, ["demo"])
    assert done.exit_code == 1
    assert done.stderr == "fxzip: error: no cut named layer9\n"
    assert done.stdout == ""
    assert isinstance(CliRunner().invoke(cli.app, ["--debug", "demo"]).exception, CutError)


def test_cli_checks_the_json_folder_before_the_training(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["demo", "--json", str(tmp_path / "no" / "t.json")])
    assert done.exit_code == 1
    assert "does not exist" in done.stderr


def test_without_scikit_learn_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(FxzipError, match=r"pip install 'fxzip\[demo\]'"):
        demo.load_digits()


def test_version_option() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.startswith("fxzip 0.")
