"""A merged network is a network: gradients, precision, some of its tasks, and merged again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.fold import fold
from fxzip.passes.trace import trace
from tests.nets import Residual, conv, pair
from tests.oracles import TOLERANCE, call, difference, images

X = images(32, 12)
QUICK = fxzip.RefitOptions(rounds=0, ridge=1e-3)


def merged(models: list[Any], x: Any = X, **options: Any) -> fxzip.ZippedModel:
    options = {"refit": QUICK, "method": "select", "verify": False, "progress": False, **options}
    return fxzip.zip(*models, [x], **options)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return pair(Residual, X, 3)


@pytest.fixture
def zipped(models: list[nn.Module]) -> fxzip.ZippedModel:
    return merged(models[:2], names=("dogs", "cats"))


# ---- gradients


def test_everything_trains_as_in_the_parents(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    loaded = fxzip.load(zipped.save(tmp_path / "m"))
    for network in (zipped, loaded):
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == []
        sum(out.square().sum() for out in network(X)).backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_what_was_frozen_stays_frozen(models: list[nn.Module], tmp_path: Path) -> None:
    frozen = copy.deepcopy(models[:2])
    for model in frozen:
        for part in (model.stem, model.norm, model.layer1):
            part.requires_grad_(False)
    zipped = merged(frozen)
    for network in (zipped, fxzip.load(zipped.save(tmp_path / "m"))):
        still = {name for name, p in network.named_parameters() if not p.requires_grad}
        assert still
        assert all(name.startswith(("trunk.stem", "trunk.layer1")) for name in still)
        assert {n for n, _ in network.trunk.named_parameters() if n.startswith(("stem", "layer1"))} == {
            name.removeprefix("trunk.") for name in still
        }


def test_a_bias_that_one_parent_trains_is_trained(models: list[nn.Module]) -> None:
    frozen = copy.deepcopy(models[:2])
    frozen[0].requires_grad_(False)
    zipped = merged(frozen)
    assert all(p.requires_grad for p in zipped.trunk.parameters())
    assert not any(p.requires_grad for p in zipped.head("task0").parameters())
    assert all(p.requires_grad for p in zipped.head("task1").parameters())


def test_new_biases_of_functions_and_folded_weights_train() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.utils.parametrizations.weight_norm(conv(3, 6, bias=False)), nn.Linear(6, 4)
            self.weight = nn.Parameter(torch.randn(6, 6) / 3)

        def forward(self, x: Any) -> Any:
            return self.head(F.linear(self.conv(x).relu().mean((2, 3)), self.weight).relu())

    zipped = merged(pair(Written, X))
    assert len(list(zipped.trunk.parameters())) == 4
    assert [name for name, p in zipped.named_parameters() if not p.requires_grad] == []


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_example_has_the_precision_of_the_weights(zipped: fxzip.ZippedModel, dtype: torch.dtype) -> None:
    zipped.to(dtype)
    assert zipped.example is not None
    assert zipped.example[0][0].dtype == dtype
    assert zipped(*zipped.example[0])[0].dtype == dtype


def test_it_exports_in_another_precision(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    assert zipped.float().export(tmp_path / "m.pt2").difference < 1e-5
    assert fxzip.load(zipped.save(tmp_path / "m")).example[0][0].dtype == torch.float32  # type: ignore[index]


def test_whole_numbers_stay_whole() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))

    words = torch.arange(64).reshape(16, 4) % 9
    zipped = merged([make().eval() for _ in range(2)], words)
    assert zipped.double().example[0][0].dtype == torch.int64  # type: ignore[index]


# ---- some of the tasks


def test_several_tasks_in_the_order_asked_for(zipped: fxzip.ZippedModel) -> None:
    dogs, cats = call(zipped, X)
    with torch.no_grad():
        found = zipped(X, task=["cats", "dogs"])
        (one,) = zipped(X, task=("dogs",))
    assert torch.equal(found[0], cats)
    assert torch.equal(found[1], dogs)
    assert torch.equal(one, dogs)
    for wrong in (["cats", "cats"], []):
        with pytest.raises(fxzip.OptionError, match="give some of dogs, cats, each once"):
            zipped(X, task=wrong)
    with pytest.raises(fxzip.OptionError, match="no task 'birds'"):
        zipped(X, task=["dogs", "birds"])


def check_narrow(network: fxzip.ZippedModel, full: fxzip.ZippedModel, tmp_path: Path) -> None:
    """Only cats is left, and all that is said of the network says so."""
    report = network.report
    assert network.names == report.names == ("cats",)
    assert report.heads == full.report.heads[1:]
    assert report.before == full.report.before[1:]
    assert {row.part for row in report.layers} == {"", "cats"}
    assert all(0 <= i < number for number, row in enumerate(report.layers) for i in row.inputs)
    assert report.fidelity is not None
    assert {answer.task for answer in report.fidelity.answers} == {"cats"}
    assert all(len(depth.unexplained) == 1 for depth in report.fidelity.depths)
    assert "dogs" not in str(report)
    assert "dogs" not in report.to_html(tmp_path / "r.html").read_text()
    assert network.export(tmp_path / "m.pt2").outputs == ("cats",)
    loaded = fxzip.load(network.save(tmp_path / "m"))
    assert loaded.report == report
    assert difference(call(full, X)[1], call(loaded, X)[0]) == 0
    assert list(network.as_models()) == ["cats"]
    assert difference(call(full, X)[1], call(network.as_models()["cats"], X)) < 1e-12


def test_select(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    check_narrow(zipped.select(["cats"]), zipped, tmp_path)
    assert zipped.names == ("dogs", "cats")
    assert zipped.select(["cats", "dogs"]).report.names == ("cats", "dogs")
    assert zipped.select(["cats"]).trunk is zipped.trunk
    with pytest.raises(fxzip.OptionError, match="no task 'birds'"):
        zipped.select(["birds"])


def test_a_head_that_is_taken_off(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    full = zipped.select(zipped.names)
    zipped.heads.pop("dogs")
    check_narrow(zipped, full, tmp_path)


# ---- merged again


@pytest.mark.parametrize("make", [Residual, lambda: Residual(norm=lambda n: nn.GroupNorm(2, n))], ids=["bn", "gn"])
def test_folding_computes_the_same(make: Any) -> None:
    model = pair(make, X)[0]
    folded = fold(canonicalise(trace(model, (X,))))
    assert difference(call(model, X), call(folded, X)) < TOLERANCE
    assert [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)] == []
    assert all(p.requires_grad for p in folded.parameters())


def test_a_third_network_joins(zipped: fxzip.ZippedModel, models: list[nn.Module], tmp_path: Path) -> None:
    three = merged([zipped, models[2]], method="zip")
    assert three.names == ("dogs", "cats", "task2")
    assert three.report.parting is None
    assert three.report.cut == merged(models, method="zip").report.cut
    assert [space.name for space in three.report.spaces] == [space.name for space in zipped.report.spaces]
    assert [row.name for row in three.report.layers if row.layer][:3] == ["stem", "layer1.conv1", "layer1.conv2"]
    assert merged([zipped, models[2]], cut="layer2").report.cut == "layer2"
    assert len(three(X)) == 3
    assert three.report.trunk.flops == zipped.report.trunk.flops
    assert three.report.fidelity is not None
    assert three.report.fidelity.unexplained < 0.5
    with pytest.raises(fxzip.RestoreError, match="merged from a merged one"):
        three.as_models()
    loaded = fxzip.load(zipped.save(tmp_path / "m"))
    again = merged([loaded, models[2]], method="zip", names=("a", "b", "c"))
    assert again.names == ("a", "b", "c")
    assert difference(call(three, X), call(again, X)) < 1e-9


def test_merged_networks_with_tasks_of_one_name(zipped: fxzip.ZippedModel) -> None:
    with pytest.raises(fxzip.OptionError, match="of the same name"):
        merged([zipped, zipped])


def test_the_ensemble_of_a_merged_network_and_another(zipped: fxzip.ZippedModel, models: list[nn.Module]) -> None:
    expected = (*call(zipped, X), call(models[2], X))
    assert difference(expected, call(merged([zipped, models[2]], cut=0.0), X)) < TOLERANCE
