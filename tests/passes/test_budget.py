"""Budgets: what a cut costs is what the merged network costs."""

from __future__ import annotations

import pytest
from torch import fx

import fxzip
from fxzip.errors import CutError
from fxzip.passes.cut.budget import count, parse_budget
from tests.nets import Residual, pair, places
from tests.oracles import images

X = images(8, 8)


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    return fxzip.prepare(*pair(Residual, X), example_inputs=X).observe([X], progress=False)


@pytest.mark.parametrize("text", ["flops<=1.3x", " FLOPs <= 1.3 x ", "flops<1.3x", "flops<=13e-1x"])
def test_a_budget_is_read(text: str) -> None:
    assert parse_budget(text) == 1.3


def test_what_is_no_budget() -> None:
    assert parse_budget("layer2") is parse_budget(None) is parse_budget(0.5) is None
    with pytest.raises(CutError, match=r'write a budget as "flops<=1\.3x"'):
        parse_budget("flops=2")
    with pytest.raises(CutError, match="write a budget"):
        parse_budget("flops<=1.2.3x")


def test_costs_are_those_of_the_merged_networks(prepared: fxzip.Prepared) -> None:
    one = prepared.convert(cut="stem", refit=False, reset_batch_norm=False, progress=False).report.before[0].flops
    for name, place in list(places(prepared).items())[::4]:
        zipped = prepared.convert(cut=name, refit=False, reset_batch_norm=False, progress=False)
        assert prepared.places.costs[place] == pytest.approx(zipped.report.flops_after / one)


def test_costs_are_counted_once_and_told_by_name(prepared: fxzip.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = prepared.costs
    assert tuple(costs) == prepared.cuts
    assert costs["layer2"] == prepared.places.costs[prepared.place("layer2")]
    prepared.place("flops<=1.5x", "layer1")
    monkeypatch.setattr(fx.Interpreter, "run_node", None)  # nothing is run again
    assert prepared.costs == costs
    prepared.place("flops<=1.6x", "layer1")


def test_the_earliest_cut_within_the_budget_is_taken(prepared: fxzip.Prepared) -> None:
    zipped = prepared.convert(cut="flops<=1.5x", refit=False, progress=False)
    place = prepared.place("flops<=1.5x")
    assert zipped.report.flops_after <= 1.5 * zipped.report.before[0].flops
    earlier = [cost for at, cost in prepared.places.costs.items() if at < place]
    assert min(earlier) > 1.5
    assert zipped.report.cut in places(prepared)


def test_a_budget_that_no_cut_meets(prepared: fxzip.Prepared) -> None:
    with pytest.raises(CutError, match=r"no cut costs at most 0\.5 .* the cheapest costs 1\.0"):
        prepared.place("flops<=0.5x")


def test_flops_are_counted_by_node(prepared: fxzip.Prepared) -> None:
    flops = count(prepared.alignment.modules[0], prepared.spec.example).flops
    assert flops["stem"] == 2 * 3 * 9 * 8 * 64
    assert flops["relu"] == 0
