"""Stems: what comes before the start stays each model's own, and merging goes on from exact values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import CutError
from fxzip.passes.cut import crossing
from fxzip.passes.refit.targets import Targets
from fxzip.passes.split.stems import STEM
from tests.nets import Net, Residual, conv, pair, permuted_copy, untouched
from tests.oracles import call, difference, images, randomise, recorded
from tests.passes.test_split import CASES

X = images(12, 8)


def cats(m: Net, x: Tensor) -> Tensor:
    x = torch.cat([m.a(x), m.b(x)], 1).relu()
    x = torch.cat([m.c(x).movedim(1, -1), m.d(x).movedim(1, -1)], -1).movedim(-1, 1)
    return F.linear(F.linear(x.mean((2, 3)), m.e.weight).relu(), m.head.weight)


KINDS = CASES | {
    "the operations of a join": Net(
        cats, a=conv(3, 4), b=conv(3, 4), c=conv(8, 4), d=conv(8, 4), e=nn.Linear(8, 6), head=nn.Linear(6, 3)
    )
}


def prepared_pair(make: Callable[[], nn.Module] = Residual) -> tuple[list[nn.Module], fxzip.Prepared]:
    models = pair(make, X)
    return models, fxzip.prepare(*models, example_inputs=X[:2]).observe([X], progress=False)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_self_zip_is_exact_from_every_start(kind: str, refit: bool) -> None:
    model = randomise(KINDS[kind], X)
    other = permuted_copy(model, X)
    prepared = fxzip.prepare(model, other, example_inputs=X).observe([X], progress=False)
    expected, tried = (call(model, X), call(other, X)), 0
    for start in prepared.cuts:
        try:
            place = prepared.place(None, start)
        except CutError:
            continue
        tried += place > 0
        zipped = prepared.convert(start=start, method="permute", refit=refit, reset_batch_norm=False, progress=False)
        for wanted, out in zip(expected, call(zipped, X), strict=True):
            assert difference(wanted, out) < 1e-8, start
    assert tried


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("method", ["zip", "permute", "select", "cca"])
def test_the_stems_are_the_models_own_and_are_joined_by_the_maps(method: str, refit: bool) -> None:
    models, prepared = prepared_pair()
    with untouched(*models):
        zipped = prepared.convert(start="layer2", method=method, refit=refit, progress=False)
    for model, own in enumerate(models):
        stem = zipped.trunk.get_submodule(f"stem{model}")
        for name, tensor in own.layer1.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor, stem.state_dict()[f"layer1.{name}"]), name
    place = prepared.place("layer2")
    plan = prepared.plan(start="layer2", method=method)
    joined = recorded(zipped.trunk, X)
    parents = [recorded(module, X) for module in prepared.alignment.modules]
    (number,) = crossing(prepared.alignment, place)
    node = prepared.alignment.shared[number]
    wanted = Targets(plan)(node[0], [found[name] for found, name in zip(parents, node, strict=True)])
    assert difference(wanted, joined[node[0]]) < 1e-9


def test_a_later_start_keeps_more() -> None:
    x = images(200, 8)
    models = pair(Residual, x)
    prepared = fxzip.prepare(*models, example_inputs=x[:2]).observe(x.split(50), progress=False)
    errors, costs = [], []
    for start in (None, "layer1", "layer2"):
        zipped = prepared.convert(start=start, method="zip", progress=False)
        expected = torch.cat([call(model, x) for model in models], 1)
        errors.append(float((torch.cat(call(zipped, x), 1) - expected).square().mean()))
        costs.append(zipped.report.flops_after)
        assert zipped.report.refitted > 0
    assert errors[2] < errors[1] < errors[0]
    assert costs[0] < costs[1] < costs[2] < 2 * zipped.report.before[0].flops


def test_batch_norms_of_the_stems_are_not_reset() -> None:
    _, prepared = prepared_pair()
    counts = [prepared.convert(start=s, refit=False, progress=False).report.recalibrated for s in (None, "layer2")]
    assert 0 < counts[1] < counts[0]


def test_the_report_tells_of_the_start_and_it_is_saved_and_exported(tmp_path: Any) -> None:
    models, x = [model.float() for model in pair(Residual, X)], X.float()
    zipped = fxzip.zip(*models, [x], start="layer2", progress=False)
    assert "merged from layer2 to fc" in str(zipped.report)
    whole = {space.name for space in fxzip.zip(*models, [x], refit=False, progress=False).report.spaces}
    merged = {space.name for space in zipped.report.spaces}
    assert merged < whole
    assert any(name.startswith("layer1") for name in whole - merged), whole
    zipped.save(tmp_path / "merged")
    loaded = fxzip.load(tmp_path / "merged")
    assert loaded.report.start == "layer2"
    for out, again in zip(call(zipped, x), call(loaded, x), strict=True):
        assert torch.equal(out, again)
    assert zipped.export(tmp_path / "merged.onnx").path.exists()


def test_budgets_count_what_is_run_twice_and_what_joins() -> None:
    _, prepared = prepared_pair()
    for cut in ("layer2", None):
        report = prepared.convert(start="layer1", cut=cut, refit=False, progress=False).report
        cost = report.flops_after / report.before[0].flops
        assert prepared.places.costs_from(prepared.place("layer1"))[prepared.place(cut)] == pytest.approx(
            cost, rel=1e-6
        )
    within = prepared.convert(start="layer1", cut=f"flops<={cost + 0.05}x", refit=False, progress=False).report
    assert cost <= within.flops_after / within.before[0].flops <= cost + 0.05
    with pytest.raises(CutError, match="cheapest costs"):
        prepared.place(f"flops<={cost - 1e-3}x", "layer1")
    with pytest.raises(CutError, match=r"start=.flops<=1\.2x.: give the name"):
        prepared.place(None, "flops<=1.2x")


def test_starts_that_cannot_be_are_told() -> None:
    models, prepared = prepared_pair()
    with pytest.raises(CutError, match="start='layer7': no shared module"):
        prepared.place(None, "layer7")
    with pytest.raises(CutError, match="start='layer2': no layer is left to merge before the cut at layer2"):
        prepared.place("layer2", "layer2")
    with pytest.raises(CutError, match=r"start=1\.5: a share"):
        fxzip.zip(*models, [X], start=1.5)


def test_tokens_and_channels_cannot_be_joined_at_once() -> None:
    def both(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x.flatten(2).mT).relu()
        return m.head(m.channels(m.tokens(x.mT).relu().mT).relu().mean(1))

    layers = {"stem": nn.Linear(3, 8), "tokens": nn.Linear(64, 6), "channels": nn.Linear(8, 8)}
    models = pair(lambda: Net(both, **layers, head=nn.Linear(8, 4)), X)
    with pytest.raises(CutError, match=r"start: .* channels along 2 axes"):
        fxzip.zip(*models, [X], start="channels", progress=False)


def test_names_that_the_models_have_are_not_taken() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem0, self.join_relu, self.b = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.join_relu(self.stem0(x))).relu().mean((2, 3)))

    models, prepared = prepared_pair(Named)
    zipped = prepared.convert(start="b", progress=False)
    assert torch.equal(zipped.trunk.get_submodule("stem0_").stem0.weight, models[0].stem0.weight)
    assert {node.meta[STEM] for node in zipped.trunk.graph.nodes if STEM in node.meta} >= {0, 1}
