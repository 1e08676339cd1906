"""Budgets: what a cut costs is what the merged network costs."""

from __future__ import annotations

import pytest

import fxzip
from fxzip.errors import CutError
from fxzip.passes.cut.budget import flops_by_node, parse_budget
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


def test_costs_are_those_of_the_merged_networks(prepared: fxzip.Prepared) -> None:
    one = prepared.convert(cut="stem", refit=False, reset_batch_norm=False, progress=False).report.before[0].flops
    for name, place in list(places(prepared).items())[::4]:
        zipped = prepared.convert(cut=name, refit=False, reset_batch_norm=False, progress=False)
        assert prepared._costs[place] == pytest.approx(zipped.report.flops_after / one)


def test_the_earliest_cut_within_the_budget_is_taken(prepared: fxzip.Prepared) -> None:
    zipped = prepared.convert(cut="flops<=1.5x", refit=False, progress=False)
    place = prepared.place("flops<=1.5x")
    assert zipped.report.flops_after <= 1.5 * zipped.report.before[0].flops
    earlier = [cost for at, cost in prepared._costs.items() if at < place]
    assert min(earlier) > 1.5
    assert zipped.report.cut in places(prepared)


def test_a_budget_that_no_cut_meets(prepared: fxzip.Prepared) -> None:
    with pytest.raises(CutError, match=r"no cut costs at most 0\.5 .* the cheapest costs 1\.0"):
        prepared.place("flops<=0.5x")


def test_flops_are_counted_by_node(prepared: fxzip.Prepared) -> None:
    flops = flops_by_node(prepared.alignment.modules[0], prepared.spec.example)
    assert flops["stem"] == 2 * 3 * 9 * 8 * 64
    assert flops["relu"] == 0
