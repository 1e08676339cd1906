"""Models that are merged by one of their modules and run whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip.parts import ZippedParts
from tests.nets import conv, untouched
from tests.oracles import difference, images, randomise

OPTIONS: dict[str, Any] = {"method": "select", "refit": False, "verify": False, "progress": False}
LOADER = [(list(images(4, 12, seed=seed)), [{"boxes": None}] * 4) for seed in range(3)]


class Backbone(nn.Module):
    """Features at two sizes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fine, self.deep = conv(3, 6), nn.BatchNorm2d(6), conv(6, 6), conv(6, 8)
        self.out_channels = 8

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x)).relu()
        return {"fine": self.fine(x), "coarse": self.deep(x[:, :, ::2, ::2]).relu()}


class Detector(nn.Module):
    """Takes a list of images and targets, gives a list of dicts."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(14, classes)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        assert isinstance(images, list)
        features = self.backbone(torch.stack(images) * 2 - 1)
        pooled = torch.cat([value.mean((2, 3)) for value in features.values()], 1)
        assert self.backbone.out_channels == 8
        return [{"scores": row.softmax(0)} for row in self.head(pooled)]


@pytest.fixture(scope="module")
def detectors() -> list[nn.Module]:
    found: list[nn.Module] = []
    for seed, classes in enumerate((3, 5)):
        model = Detector(classes).double().eval()
        randomise(model.backbone, images(4, 12), seed)
        model.head.weight.data.mul_(20)
        found.append(model)
    return found


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.stack([row["scores"] for row in model(*LOADER[0])])


def test_the_users_models_get_no_hook(detectors: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    hooked: list[nn.Module] = []
    register = nn.Module.register_forward_pre_hook

    def record(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hooked.append(self)
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", record)
    fxzip.zip_part(*detectors, LOADER, part="backbone", **OPTIONS)
    assert hooked
    assert not {id(model.backbone) for model in detectors} & set(map(id, hooked))


def test_whole_models_with_a_merged_part(detectors: list[nn.Module], tmp_path: Path) -> None:
    with untouched(*detectors):
        merged = fxzip.zip_part(*detectors, LOADER, part="backbone", names=("a", "b"), **OPTIONS)
    assert merged.zipped.names == ("a", "b")
    assert [scores(model).shape for model in merged.models.values()] == [(4, 3), (4, 5)]
    assert difference(scores(detectors[0]), scores(merged.models["a"])) > 1e-6
    assert merged.models["a"].backbone.zipped is merged.models["b"].backbone.zipped
    assert merged.models["a"].head is not detectors[0].head
    loaded = fxzip.load(merged.zipped.save(tmp_path / "part"))
    again = fxzip.put_part(loaded, dict(zip(("a", "b"), detectors, strict=True)), "backbone")
    assert difference(scores(merged.models["b"]), scores(again.models["b"])) == 0


def test_zip_takes_a_part(detectors: list[nn.Module]) -> None:
    with untouched(*detectors):
        merged = fxzip.zip(*detectors, LOADER, part="backbone", names=("a", "b"), **OPTIONS)
    assert isinstance(merged, ZippedParts)
    same = fxzip.zip_part(*detectors, loader=LOADER, part="backbone", names=("a", "b"), **OPTIONS)
    assert difference(scores(merged.models["a"]), scores(same.models["a"])) == 0
    with pytest.raises(fxzip.OptionError, match="unknown argument 'ctu'"):
        fxzip.zip(*detectors, LOADER, part="backbone", ctu=0.5, **OPTIONS)
    with pytest.raises(fxzip.OptionError, match="no loader: call"):
        fxzip.zip(*detectors, part="backbone")


@pytest.mark.parametrize("given", [{"resume": "kept"}, {"memory": "4GB"}, {"stats_device": "cpu"}, {"stitch": True}])
def test_what_a_part_does_not_take_is_said(detectors: list[nn.Module], given: dict[str, str]) -> None:
    with pytest.raises(fxzip.OptionError, match=f"{next(iter(given))} is for merges of whole networks"):
        fxzip.zip(*detectors, [], part="backbone", **given)


def test_an_ensemble_of_parts_is_the_models(detectors: list[nn.Module]) -> None:
    merged = fxzip.zip_part(*detectors, LOADER, part="backbone", cut=0.0, **OPTIONS)
    for own, model in zip(detectors, merged.models.values(), strict=True):
        assert difference(scores(own), scores(model)) < 1e-12


def test_inputs_by_name() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()
            self.head = nn.Linear(6, 2)

        def forward(self, words: Tensor, extra: Tensor) -> Tensor:
            return self.head(self.encoder(words, mask=extra))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.out = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, words: Tensor, mask: Tensor) -> Tensor:
            return self.out((self.mix(self.words(words)).relu() * mask[..., None]).mean(1))

    batch = {"words": torch.arange(24).reshape(6, 4) % 9, "extra": torch.ones(6, 4).double()}
    towers = [Tower().double().eval() for _ in range(2)]
    merged = fxzip.zip_part(*towers, [batch], part="encoder", cut=0.0, **OPTIONS)
    with torch.no_grad():
        assert difference(towers[1](**batch), merged.models["task1"](**batch)) < 1e-12


def test_mistakes(detectors: list[nn.Module]) -> None:
    with pytest.raises(fxzip.OptionError, match=r"no part 'neck'; it has backbone, head"):
        fxzip.zip_part(*detectors, LOADER, part="neck")
    with pytest.raises(fxzip.CalibrationError, match="does not take the loader's batches"):
        fxzip.zip_part(*detectors, [images(4, 12)], part="backbone")
    with pytest.raises(fxzip.OptionError, match="gets other inputs in model 1"):
        fxzip.zip_part(*detectors, LOADER, part="head")
    unused = copy.deepcopy(detectors)
    for model in unused:
        model.extra = nn.Linear(2, 2)
    with pytest.raises(fxzip.CalibrationError, match="does not use its extra"):
        fxzip.zip_part(*unused, LOADER, part="extra")


@pytest.mark.slow
def test_detectors_of_torchvision() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as make

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    models = [make(num_classes=classes, **sizes).eval() for classes in (3, 5)]
    loader = [([torch.rand(3, 64, 64) for _ in range(2)], None) for _ in range(2)]
    merged = fxzip.zip_part(*models, loader, part="backbone", **OPTIONS)
    assert merged.zipped.report.flops_after < 0.7 * merged.zipped.report.flops_before
    with torch.no_grad():
        for own, other in zip(models, merged.models.values(), strict=True):
            for a, b in zip(own(loader[0][0]), other(loader[0][0]), strict=True):
                assert {key: value.shape[1:] for key, value in a.items()} == {k: v.shape[1:] for k, v in b.items()}
                assert len(b["boxes"])
