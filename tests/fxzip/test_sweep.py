"""Sweeps: many merges from one pass, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxzip
from fxzip.errors import OptionError
from fxzip.merged import ZippedModel
from tests.nets import Residual, pair
from tests.oracles import call, difference, images

X = images(8, 8)


@pytest.fixture(scope="module")
def sweep() -> fxzip.Sweep:
    torch.manual_seed(0)
    models = pair(Residual, X)
    expected = [call(model, X) for model in models]

    def closeness(zipped: ZippedModel) -> dict[str, float]:
        errors = [difference(a, b) for a, b in zip(expected, call(zipped, X), strict=True)]
        return {"closeness": -max(errors), "mean": -sum(errors) / 2}

    prepared = fxzip.prepare(*models, example_inputs=X).observe([X], hold_back=False, progress=False)
    methods = ["permute", {"method": "zip", "refit": False, "name": "zip, paper's rule"}]
    return prepared.sweep(["layer1", "layer2", None], methods, closeness, progress=False)


def test_a_row_for_each_cut_and_method(sweep: fxzip.Sweep) -> None:
    assert [(row.method, row.cut) for row in sweep.rows] == [
        (method, cut) for method in ("permute", "zip, paper's rule") for cut in ("layer1", "layer2", "fc")
    ]
    costs = [row.flops for row in sweep.rows[:3]]
    assert costs == sorted(costs, reverse=True)
    assert 1 < costs[-1] < 1.01
    early, late = sweep.rows[3], sweep.rows[5]  # without refit, which fits these very images at any cut
    assert early.scores["closeness"] > late.scores["closeness"]


def test_the_best_within_a_budget(sweep: fxzip.Sweep) -> None:
    cheap = [row for row in sweep.rows if row.flops <= 1.5]
    assert sweep.best(1.5) == max(cheap, key=lambda row: row.scores["closeness"])
    assert sweep.best(9, "mean") == max(sweep.rows, key=lambda row: row.scores["mean"])
    with pytest.raises(OptionError, match=r"costs at most 0\.5x; the cheapest costs 1\.0"):
        sweep.best(0.5)


def test_it_prints_and_is_written(sweep: fxzip.Sweep, tmp_path: Path) -> None:
    assert "closeness" in str(sweep)
    assert "zip, paper's rule" in str(sweep)
    sweep.to_json(tmp_path / "sweep.json")
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["flops"] for row in rows] == [row.flops for row in sweep.rows]


def test_it_is_drawn(sweep: fxzip.Sweep, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep.plot(tmp_path / "sweep.svg", "mean")
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_cuts_are_spread_where_none_are_given() -> None:
    prepared = fxzip.prepare(*pair(Residual, X), example_inputs=X).observe([X], progress=False)
    found = prepared.sweep(methods=["average"], evaluate=lambda zipped: zipped.report.flops_after, progress=False)
    costs = [row.flops for row in found.rows]
    assert len(costs) > 3
    assert costs == sorted(costs, reverse=True)
