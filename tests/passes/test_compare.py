"""Fidelity: what is exact is called so, what is lost is seen, and what has no classes has no agreement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import CutError, LowFidelityWarning, OptionError
from tests.nets import Net, Residual, pair
from tests.oracles import call, images, randomise

X = images(40, 8)


def permuted(model: nn.Module) -> nn.Module:
    return fxzip.analyse(model, X[:2]).permute(model)


def test_a_network_merged_with_its_copy_is_faithful() -> None:
    model = randomise(Residual(), X)
    found = fxzip.zip(model, permuted(model), [X], method="permute", progress=False).report.fidelity
    assert found is not None
    assert found.images == 10
    assert found.agreement == 1
    assert found.unexplained < 1e-6
    assert [answer.task for answer in found.answers] == ["task0", "task1"]
    assert max(max(depth.unexplained) for depth in found.depths) < 1e-6


def test_it_is_what_the_parents_say_of_images_that_were_held_back() -> None:
    models = pair(Residual, X)
    prepared = fxzip.prepare(*models, example_inputs=X[:2]).observe([X], progress=False)
    zipped = prepared.convert(method="zip", refit=False, progress=False)
    (held,) = (batch.args[0] for batch in prepared.held)
    assert not any(torch.equal(one, other) for one in held for other in X[:3])
    found = zipped.report.fidelity
    assert found is not None
    for answer, model, out in zip(found.answers, models, call(zipped, held), strict=True):
        wanted = call(model, held)
        share = (wanted - out).square().sum() / (wanted - wanted.mean(0)).square().sum()
        assert answer.unexplained == pytest.approx(float(share))
        assert answer.agreement == pytest.approx(float((wanted.argmax(1) == out.argmax(1)).double().mean()))
        kl = F.kl_div(out.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        assert answer.kl == pytest.approx(float(kl))


def test_outputs_of_a_structure_are_named_and_maps_have_no_classes() -> None:
    def body(m: Net, x: Tensor) -> dict[str, Tensor]:
        y = m.stem(x).relu()
        return {"logits": m.head(y.mean((2, 3))), "map": m.out(y)}

    layers = {"stem": nn.Conv2d(3, 6, 3), "head": nn.Linear(6, 4), "out": nn.Conv2d(6, 2, 1)}
    models = [randomise(Net(body, **{k: type(v)(*_sizes(v)) for k, v in layers.items()}), X, seed) for seed in (0, 1)]
    found = fxzip.zip(*models, [X], method="zip", progress=False).report.fidelity
    assert found is not None
    assert {answer.output: answer.agreement is None for answer in found.of("task0")} == {
        "['logits']": False,
        "['map']": True,
    }


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels, layer.kernel_size[0]


def test_a_poor_merge_says_so_and_what_helps() -> None:
    many = images(160, 8)
    models = pair(Residual, many)
    with pytest.warns(LowFidelityWarning, match="on .*% of 40 images that .*; more images, an earlier"):
        fxzip.prepare(*models, example_inputs=X[:2]).observe([many], progress=False).convert(
            method="average", refit=False, progress=False
        )


def test_it_is_saved_and_shown(tmp_path: object) -> None:
    zipped = fxzip.zip(*pair(Residual, X), [X], method="zip", progress=False)
    zipped.save(f"{tmp_path}/m")
    assert fxzip.load(f"{tmp_path}/m").report.fidelity == zipped.report.fidelity
    assert "fidelity: task0: " in str(zipped.report)


def test_without_images_held_back_there_is_none() -> None:
    prepared = fxzip.prepare(*pair(Residual, X), example_inputs=X[:2])
    prepared.observe([X], hold_back=False, progress=False)
    assert prepared.convert(method="zip", progress=False).report.fidelity is None
    with pytest.raises(CutError, match="no image was held back"):
        prepared.convert(cut="fidelity>=0.9", method="zip", progress=False)
    with pytest.raises(OptionError, match="sweep needs evaluate"):
        prepared.sweep(progress=False)


def test_a_sweep_without_labels_and_the_latest_cut_that_is_faithful() -> None:
    prepared = fxzip.prepare(*pair(Residual, X), example_inputs=X[:2]).observe([X], progress=False)
    rows = prepared.sweep(["layer1", None], ["zip"], progress=False).rows
    assert [set(row.scores) for row in rows] == [{"agreement", "explained"}] * 2
    assert prepared.convert(cut="fidelity>=0", method="zip", progress=False).report.cut == prepared.cuts[-1]
    with pytest.raises(CutError, match=r"no cut keeps a fidelity of 1: the best that was tried, .*, keeps 0\."):
        fxzip.prepare(*pair(Residual, X), example_inputs=X[:2]).observe([X], progress=False).convert(
            cut="fidelity>=1.0", method="average", refit=False, reset_batch_norm=False, progress=False
        )
    with pytest.raises(CutError, match=r'write a bound on fidelity as "fidelity>=0\.98"'):
        prepared.convert(cut="fidelity>2", progress=False)
