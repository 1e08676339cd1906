"""One head that answers for all: networks of the same classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip import OptionError
from fxzip.demo import DigitNet
from tests.oracles import images

X = images(48, 16, channels=1).float()


def networks(make: Callable[[], nn.Module] = DigitNet, count: int = 2) -> list[nn.Module]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(make().eval())
    return found


def merged(models: list[nn.Module], **options: object) -> fxzip.ZippedModel:
    return fxzip.zip(*models, [X[:24], X[24:]], method="select", progress=False, **options)


@pytest.mark.parametrize("cut", [None, "layer2"])
@pytest.mark.parametrize("weights", [None, {"task0": 3, "task1": 1, "task2": 1}])
def test_the_mean_is_that_of_the_heads(cut: str | None, weights: Mapping[str, float] | None) -> None:
    models = networks(count=3)
    each, one = merged(models, cut=cut), merged(models, cut=cut, heads=weights or "mean")
    shares = torch.tensor([0.6, 0.2, 0.2] if weights else [1 / 3] * 3)
    wanted = (torch.stack(each(X)) * shares[:, None, None]).sum(0)
    assert one.names == ("joint",)
    assert torch.allclose(one(X, task="joint"), wanted, atol=1e-5)
    assert all(parameter.requires_grad for parameter in one.heads["joint"].parameters())
    if cut is None:  # one linear layer, that costs what one did
        assert one.report.heads[0] == each.report.heads[0]


def test_the_product_is_the_mean_of_log_probabilities() -> None:
    models = networks()
    each, one = merged(models), merged(models, heads="product")
    wanted = torch.stack([output.log_softmax(1) for output in each(X)]).mean(0)
    assert torch.allclose(one(X, task="joint"), wanted, atol=1e-5)


def test_its_fidelity_is_to_the_ensemble() -> None:
    models = networks()
    one = merged(models, heads="mean")
    (answer,) = one.report.fidelity.answers
    assert answer.task == "joint"
    prepared = fxzip.prepare(*models, example_inputs=X[:2]).observe([X[:24], X[24:]], progress=False)
    held = torch.cat([batch.args[0] for batch in prepared.held])
    with torch.no_grad():
        ensemble: Tensor = (models[0](held) + models[1](held)) / 2
        agreement = (one(held, task="joint").argmax(1) == ensemble.argmax(1)).double().mean().item()
    assert answer.agreement == pytest.approx(agreement)


@pytest.mark.parametrize("cut", [None, "layer2"])
def test_it_is_saved_and_exported(tmp_path: Path, cut: str | None) -> None:
    one = merged(networks(), heads="mean", cut=cut)
    again = fxzip.load(one.save(tmp_path / "merged"))
    assert torch.equal(again(X, task="joint"), one(X, task="joint"))
    one.export(tmp_path / "one.onnx")
    assert "joint" in str(one.report)


def test_a_full_merge_goes_back_into_the_class() -> None:
    one = merged(networks(), heads="mean")
    model = one.as_models()["joint"]
    assert isinstance(model, DigitNet)
    assert torch.allclose(model(X), one(X, task="joint"), atol=1e-4)


class Seven(DigitNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.head.in_features, 7)


class Several(DigitNet):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = super().forward(x)
        return found, found


@pytest.mark.parametrize(
    ("make", "heads", "message"),
    [
        (Seven, "mean", r"outputs of one shape; task0 gives \(batch, \d+\), task1 gives \(batch, 7\)"),
        (Several, "mean", "models that give one tensor; task1 gives several"),
        (DigitNet, "sum", "heads='sum': give 'each'"),
        (DigitNet, {"task0": 1.0}, "heads has weights of task0; the tasks are task0, task1"),
        (DigitNet, {"task0": 1.0, "task1": 0}, "the weight of 'task1' is 0"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(make: type[nn.Module], heads: object, message: str) -> None:
    models = [*networks(count=1), *networks(make, 1)]
    with pytest.raises(OptionError, match=message):
        fxzip.zip(*models, [X[:4]], heads=heads, progress=False)


@pytest.mark.parametrize("cut", [None, "layer2"])
def test_all_classes_in_one_list(cut: str | None, tmp_path: Path) -> None:
    models = [DigitNet(classes=5).eval(), DigitNet(classes=3).eval()]
    labels = {"low": list("01234"), "high": list("567")}
    options = {"names": ("low", "high"), "labels": labels, "cut": cut}
    each, one = merged(models, **options), merged(models, heads="concat", **options)
    assert one.names == ("joint",)
    assert torch.allclose(one(X, task="joint"), torch.cat(each(X), 1), atol=1e-5)
    assert one.labels == {"joint": tuple("01234567")}
    (answer,) = one.report.fidelity.answers
    assert answer.task == "joint"
    assert answer.agreement is not None
    again = fxzip.load(one.save(tmp_path / "m"))
    assert torch.equal(again(X)[0], one(X)[0])
    (found,) = again.predict(X[0], top=8).values()
    assert sorted(each.label for each in found) == list("01234567")
    assert merged(models, heads="concat", names=("low", "high"), labels={"low": labels["low"]}).labels == {}


def test_one_list_wants_maps_of_one_size() -> None:
    class Map(nn.Module):
        def __init__(self, classes: int, stride: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, classes, 3, stride)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    one = merged([Map(3, 1), Map(5, 1)], heads="concat")
    assert one(X)[0].shape == (48, 8, 12, 12)
    with pytest.raises(OptionError, match="outputs of one shape; task0 gives"):
        merged([Map(3, 1), Map(5, 2)], heads="concat")
