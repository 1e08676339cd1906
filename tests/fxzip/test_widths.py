"""Widths and budgets: what `zip`, `convert` and `shrink` make of them, from two small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxzip
from fxzip.errors import OptionError
from fxzip.passes.allocate import Costs, Term, allocate, rounded
from fxzip.testing import call, images, randomise
from fxzip.widths import parse_widths
from tests.nets import Residual, permuted_copy, untouched
from tests.passes.test_resize import Attention

X = images(160, 8)
FAST = {"progress": False, "method": "select", "refit": fxzip.RefitOptions(rounds=0, ridge=1e-3)}


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    models = [randomise(Residual(width=8), X, seed).float() for seed in (0, 1)]
    made = fxzip.prepare(*models, example_inputs=X[:2].float())
    return made.observe(X.float().split(40), progress=False)


def merged(report: Any) -> dict[str, int]:
    return {row.name: row.merged or row.size for row in report.spaces}


def ratio(report: Any) -> float:
    return float(len(report.before) * report.flops_after / report.flops_before)


def test_a_wider_trunk_is_nearer_to_the_models(prepared: fxzip.Prepared) -> None:
    plain, wide = (prepared.convert(width=width, **FAST).report for width in (None, 1.5))
    assert merged(wide) == {row.name: round(1.5 * row.size) for row in plain.spaces}
    assert wide.fidelity.unexplained < plain.fidelity.unexplained
    assert ratio(plain) < 1.05 < ratio(wide)
    assert "width 1.5" in str(wide)
    assert "8 -> 12" in str(wide)
    assert wide.verified.merge < 1e-7


def test_all_channels_of_all_models_lose_nothing(prepared: fxzip.Prepared) -> None:
    zipped = prepared.convert(width=2.0, refit=False, reset_batch_norm=False, method="select", progress=False)
    for model, found in zip(prepared.alignment.modules, zipped(X.float()), strict=True):
        assert torch.allclose(found, call(model, X.float()), atol=1e-4)


def test_without_a_width_nothing_is_resized(prepared: fxzip.Prepared) -> None:
    one, none = prepared.plan(method="zip", width=1.0), prepared.plan(method="zip")
    assert one.resized is None
    assert none.resized is None
    for name, found in none.maps.items():
        assert torch.equal(found.merge, one.maps[name].merge)


def test_a_module_by_its_name(prepared: fxzip.Prepared) -> None:
    found = merged(prepared.convert(width={"layer1": 1.5, "layer2.conv1": 0.5}, **FAST).report)
    sizes = {space.name: space.size for space in prepared.spec.spaces}
    assert found["layer1.conv1"] == 12
    assert found["layer2.conv1"] == 6
    assert found["stem"] == sizes["stem"]


@pytest.mark.parametrize("method", ["select", "zip"])
@pytest.mark.parametrize("width", [0.6, 1.3])
def test_cuts_starts_and_methods_take_widths(prepared: fxzip.Prepared, method: str, width: float) -> None:
    for where in ({"cut": "layer2"}, {"start": "layer2"}, {"cut": "layer2.conv2", "start": "layer1"}):
        report = prepared.convert(width=width, **where, **{**FAST, "method": method}).report
        assert report.verified.merge < 1e-7, where
        assert any(row.merged for row in report.spaces), where


@pytest.mark.parametrize("budget", ["flops<=0.7x", "flops<=1.3x", "params<=1.2x"])
def test_a_budget_is_kept_and_used(prepared: fxzip.Prepared, budget: str) -> None:
    report = prepared.convert(budget=budget, **FAST).report
    limit = float(budget.split("=")[1][:-1])
    cost = ratio(report) if "flops" in budget else 2 * report.params_after / report.params_before
    assert 0.8 * limit < cost <= limit
    assert budget in report.where


def test_fidelity_as_a_budget_takes_the_narrowest(prepared: fxzip.Prepared) -> None:
    wide = prepared.convert(width=1.4, **FAST).report  # about two networks, which is the most that a budget takes
    least = round(wide.fidelity.score - 0.05, 3)
    report = prepared.convert(budget=f"fidelity>={least}", **FAST).report
    assert ratio(report) < ratio(wide)
    with pytest.raises(OptionError, match=r"fidelity>=1.*the widest trunk that was tried keeps 0\."):
        prepared.convert(budget="fidelity>=1", **FAST)


def test_heads_are_kept_as_wholes() -> None:
    models = [randomise(Attention(), X, seed).float() for seed in (0, 1)]
    prepared = fxzip.prepare(*models, example_inputs=X[:2].float()).observe(X.float().split(40), progress=False)
    heads = next(space for space in prepared.spec.spaces if prepared.spec.children(space.name))
    for width, count in ((0.5, 2), (1.5, 6)):
        report = prepared.convert(width=width, **FAST).report
        assert merged(report)[heads.name] == count
        assert report.verified.merge < 1e-7


def test_shrink_is_a_merge_of_one(tmp_path: Path) -> None:
    model = randomise(Residual(width=8), X).float()
    with untouched(model):
        small = fxzip.shrink(model, X.float().split(40), budget="flops<=0.6x", **FAST)
    assert ratio(small.report) <= 0.6
    assert small.names == ("model",)
    assert small.report.fidelity.unexplained < 0.5
    again = fxzip.load(small.save(tmp_path / "small"))
    assert torch.equal(again(X[:4].float(), task="model"), small(X[:4].float(), task="model"))
    assert again.report == small.report
    assert small.export(tmp_path / "small.onnx").path.exists()


def test_what_has_copies_shrinks_without_loss() -> None:
    """Two copies of a network side by side, merged at full width, are the network with every channel twice."""
    model = randomise(Residual(width=8), X).double()
    other = permuted_copy(model, X)
    prepared = fxzip.prepare(model, other, example_inputs=X[:2]).observe(X.split(40), progress=False)
    both = prepared.convert(width=1.0, method="select", refit=False, reset_batch_norm=False, progress=False)
    assert torch.allclose(both(X)[0], call(model, X), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"width": 0.01}, "less than one of the 8 channels or blocks of stem"),
        ({"width": 2.5}, "it is 2 at the most"),
        ({"width": {"layer9": 1.2}}, "no merged channel space lies there; there are .*layer1"),
        ({"width": {}}, "name modules or channel spaces"),
        ({"width": True}, "a number above 0"),
        ({"width": float("nan")}, "a number above 0"),
        ({"width": "1.2"}, "a number above 0"),
        ({"budget": "flops<=0.001x"}, r"the least that the merge can cost is 0\.\d+x"),
        ({"budget": "cheap"}, 'write "flops<=1.2x"'),
        ({"budget": 1.2}, 'write "flops<=1.2x"'),
        ({"width": 1.2, "budget": "flops<=1.2x"}, "give one of them"),
        ({"width": 1.2, "cut": "flops<=1.2x"}, "a cut by its cost"),
        ({"width": 1.2, "method": "permute"}, "leaves one network's width"),
    ],
)
def test_bad_widths_are_told_before_the_work(given: dict[str, Any], says: str) -> None:
    models = [randomise(Residual(), X[:8], seed).float() for seed in (0, 1)]

    class Loader:
        reads = 0

        def __iter__(self) -> Any:
            Loader.reads += 1
            yield X[:8].float()
            if Loader.reads > 2:
                raise AssertionError("the loader was read for the work")

    with pytest.raises(OptionError, match=says):
        fxzip.zip(*models, Loader(), progress=False, **given)


def test_shrink_wants_a_width_or_a_budget() -> None:
    model = randomise(Residual(), X[:8]).float()
    with pytest.raises(OptionError, match="width or a budget"):
        fxzip.shrink(model, [X[:8].float()])
    with pytest.raises(OptionError, match="it is 1 at the most"):
        fxzip.shrink(model, [X[:8].float()], width=1.2, progress=False)
    with pytest.raises(OptionError, match="not a torch"):
        fxzip.shrink("model", [X[:8].float()], width=0.5)  # type: ignore[arg-type]


def test_what_must_keep_its_number_says_why() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    x = torch.randn(32, 4)
    with pytest.raises(OptionError, match="a: norm sums over its channels without weights"):
        fxzip.shrink(Normed(), [x], width=0.5, progress=False)


def test_parsing() -> None:
    assert parse_widths(None, None) is None
    assert str(parse_widths(1.15, None)) == "1.15"
    assert str(parse_widths({"layer1": 1.3, "layer2": 1}, None)) == "layer1 1.3, layer2 1"
    assert str(parse_widths(None, " FLOPs <= 1.20x")) == "flops<=1.2x"
    assert str(parse_widths(None, "fidelity>=.98")) == "fidelity>=0.98"


def test_channels_go_where_they_are_worth_most() -> None:
    """Of two layers of one size and cost, the one whose channels tell more gets more."""

    class Root:
        def __init__(self, name: str) -> None:
            self.name, self.size = name, 32

    roots: Any = [Root("flat"), Root("steep")]
    curves = {"flat": torch.linspace(1, 0.9, 33).numpy(), "steep": torch.linspace(1, 0, 33).square().numpy()}
    costs = Costs([Term(1.0, ((0.0, {name: 1 / 32}),)) for name in ("flat", "steep")], 0.0, 2.0)
    found = allocate(roots, curves, costs, 0.5, 1)
    assert costs(found) <= 0.5
    assert found["steep"] > found["flat"] >= 2
    assert allocate(roots, {"flat": curves["steep"], "steep": curves["steep"]}, costs, 0.5, 1) == {
        "flat": 16,
        "steep": 16,
    }


def test_large_numbers_are_multiples_of_eight() -> None:
    assert [rounded(size, 512) for size in (0.2, 18.4, 73.6, 300.0, 1000.0)] == [2, 18, 72, 304, 512]
