"""`keep_norms`: BatchNorms stay in the merged network, exact in eval mode, and train in train mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import fxzip
from tests.nets import Residual, pair
from tests.oracles import call, difference, images, randomise

X = images(48, 12)
KEPT = fxzip.RefitOptions(rounds=1, ridge=1e-3, keep_norms=True)
FOLDED = fxzip.RefitOptions(rounds=1, ridge=1e-3)


def merged(models: list[nn.Module], x: Any = X, refit: Any = KEPT, **options: Any) -> fxzip.ZippedModel:
    fixed: dict[str, Any] = {"method": "select", "hold_back": False, "verify": False, "progress": False}
    return fxzip.zip(*models, [x[:20], x[20:]], refit=refit, **{**fixed, **options})


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def timm_pair(name: str) -> list[nn.Module]:
    return [randomise(timm.create_model(name, num_classes=n).double().eval(), images(8, 32)) for n in (3, 4)]


def running_means(zipped: fxzip.ZippedModel) -> list[torch.Tensor]:
    return [zipped.get_buffer(f"{name}.running_mean").clone() for name in norms(zipped)]


def all_differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) > 0 and not any(map(torch.equal, before, after))


NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], torch.Tensor]] = {
    "modules": (lambda: pair(Residual, X), X),
    "functions": (lambda: timm_pair("test_resnet"), images(24, 32)),
    "efficientnet": (lambda: timm_pair("test_efficientnet"), images(24, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut", [None, 0.5])
def test_they_change_nothing_in_eval_mode(name: str, cut: float | None) -> None:
    make, x = NETWORKS[name]
    models = make()
    kept, folded = (merged(models, x, refit, cut=cut) for refit in (KEPT, FOLDED))
    assert max(map(difference, call(folded, x), call(kept, x))) < 1e-10
    count = {name: len(norms(model)) for name, model in (("kept", kept), ("folded", folded), ("one", models[0]))}
    assert count["kept"] >= count["one"] > count["folded"]
    assert kept.report.refitted == folded.report.refitted


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_the_images(name: str) -> None:
    """In train mode the merged network answers much as in eval mode, and its statistics follow."""
    make, x = NETWORKS[name]
    zipped = merged(make(), x)
    before = running_means(zipped)
    expected = call(zipped, x)
    for norm in norms(zipped).values():
        norm.train()
    with torch.no_grad():
        found = zipped(x)
        zipped(2 * x + 1)
    for a, b in zip(expected, found, strict=True):
        assert difference(a, b) < 0.05  # but for the unbiased variance, nothing differs
    assert all_differ(before, running_means(zipped))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut", [None, 0.0])
def test_without_refit_they_stay_anyway(name: str, cut: float | None, tmp_path: Path) -> None:
    """Also where a model's class writes them as functions, which would be in eval mode for ever."""
    make, x = NETWORKS[name]
    models = make()
    zipped = merged(models, x, False, cut=cut)
    if cut == 0:
        assert max(difference(model(x), y) for model, y in zip(models, call(zipped, x), strict=True)) < 1e-10
    else:
        assert zipped.report.recalibrated == len(norms(zipped))
    assert len(norms(zipped)) == len(norms(models[0])) * (1 if cut is None else 2)
    assert sorted(norms(fxzip.load(zipped.save(tmp_path / "out")))) == sorted(norms(zipped))
    parameters = dict(zipped.named_parameters())
    assert all(parameters[f"{name}.{key}"].requires_grad for name in norms(zipped) for key in ("weight", "bias"))
    before = running_means(zipped)
    zipped.train()(x)
    assert all_differ(before, running_means(zipped))
    for model, again in zip(models, zipped.eval().as_models().values(), strict=True):
        assert list(again.state_dict()) == list(model.state_dict())


def test_they_train() -> None:
    zipped = merged(pair(Residual, X))
    trainable = {name for name, p in zipped.named_parameters() if p.requires_grad}
    names = {f"{name}.{key}" for name in norms(zipped) for key in ("weight", "bias")}
    assert names <= trainable
    zipped.train()
    optimizer = torch.optim.SGD(zipped.parameters(), lr=0.05)
    targets = [torch.randn_like(y) for y in zipped(X)]
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = sum(((y - t) ** 2).mean() for y, t in zip(zipped(X), targets, strict=True))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in zipped.named_parameters() if name in names)


@pytest.mark.parametrize("name", NETWORKS)
def test_they_go_back_into_the_models_classes(name: str) -> None:
    make, x = NETWORKS[name]
    models = make()
    zipped = merged(models, x)
    made = list(zipped.as_models().values())
    for number, (own, model) in enumerate(zip(models, made, strict=True)):
        assert difference(call(zipped, x)[number], call(model, x)) < 1e-10
        assert model.state_dict().keys() == own.state_dict().keys()
    moving = [float(norm.running_mean.abs().max()) for norm in norms(made[0]).values()]  # type: ignore[operator]
    assert min(moving) > 0  # they are statistics, not the 0 of a folded norm


def test_they_are_saved_and_merged_again(tmp_path: Path) -> None:
    models = pair(Residual, X)
    zipped = merged(models)
    again = fxzip.load(zipped.save(tmp_path / "m"))
    assert max(map(difference, call(zipped, X), call(again, X))) == 0
    assert norms(again).keys() == norms(zipped).keys()
    third = fxzip.zip(
        zipped, models[0], [X], names=("a", "b", "c"), refit=FOLDED, method="select", hold_back=False, progress=False
    )
    assert third.names == ("a", "b", "c")
    assert len(third(X)) == 3


def test_widths_and_starts() -> None:
    models = pair(Residual, X)
    for options in ({"width": 1.5}, {"start": "layer2"}):
        kept, folded = (merged(models, X, refit, **options) for refit in (KEPT, FOLDED))
        assert max(map(difference, call(folded, X), call(kept, X))) < 1e-10
        assert len(norms(kept)) > len(norms(folded))
