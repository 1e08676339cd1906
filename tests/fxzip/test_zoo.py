"""Models by name with the user's own weights, in whatever a training script has wrapped them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fxzip import zoo
from fxzip.errors import CheckpointError, FxzipError, OptionError
from fxzip.model_names import written_models

NAME = "timm:test_resnet"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=5).eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    own, other = first.state_dict(), second.state_dict()
    return list(own) == list(other) and all(torch.equal(own[key], other[key]) for key in own)


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model": lambda s: {"model": s},
    "data parallel": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module._orig_mod."),
    "lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "loss.weight": torch.ones(2)}},
    "averaged": lambda s: {"model_ema": {"n_averaged": torch.tensor(3), **prefixed(s, "module.")}},
    "timm": lambda s: {"state_dict": s, "args": argparse.Namespace(model="test_resnet")},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_and_the_class_count(model: nn.Module, tmp_path: Path, how: str) -> None:
    torch.save(WRAPPED[how](model.state_dict()), tmp_path / "a.pth")
    loaded = zoo.load(NAME, tmp_path / "a.pth")
    assert same(loaded, model)
    assert loaded.num_classes == 5
    assert not any(module.training for module in loaded.modules())


def test_safetensors(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert same(zoo.load(NAME, str(tmp_path / "a.safetensors")), model)


@pytest.mark.parametrize(("ema", "value"), [(True, 2.0), (False, 1.0)])
@pytest.mark.parametrize("nested", [True, False])
def test_ema_is_preferred_or_not(model: nn.Module, tmp_path: Path, ema: bool, value: float, nested: bool) -> None:
    one, two = ({k: torch.full_like(v, x) for k, v in model.state_dict().items()} for x in (1, 2))
    saved = {"state_dict": one, "state_dict_ema": two} if nested else {**prefixed(two, "ema."), **prefixed(one, "net.")}
    torch.save(saved, tmp_path / "a.pth")
    assert zoo.load(NAME, tmp_path / "a.pth", ema=ema).fc.weight.unique().tolist() == [value]


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "squeezenet1_1", "convnext_tiny", "googlenet", "fcn_resnet50", "regnet_y_400mf"]
)
def test_class_counts_of_torchvision(name: str) -> None:
    extra = {"aux_logits": False} if name == "googlenet" else {}
    with torch.device("cpu" if name == "regnet_y_400mf" else "meta"):  # which cannot be built on meta
        kind = {"weights_backbone": None} if name == "fcn_resnet50" else {}
        own = torchvision.models.get_model(name, weights=None, num_classes=6, **extra, **kind)
    assert zoo._count_classes(f"torchvision:{name}", own.state_dict(), extra) == 6


@pytest.mark.parametrize(
    "name", ["test_vit", "test_efficientnet", "test_convnext", "test_byobnet", "deit_tiny_distilled_patch16_224"]
)
def test_class_counts_of_timm(name: str) -> None:
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=6)
    assert zoo._count_classes(f"timm:{name}", own.state_dict(), {}) == 6


def test_torchvision_model_and_its_preparation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(saved.state_dict(), tmp_path / "a.pth")
    loaded = zoo.load("torchvision:resnet18", tmp_path / "a.pth")
    assert same(loaded, saved)
    config = zoo.data_config(loaded)
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)
    picture = Image.radial_gradient("L").resize((300, 260)).convert("RGB")
    theirs = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(picture)
    assert (zoo.transform(config)(picture) - theirs).abs().max() < 0.05


def test_preparation_is_timms_and_can_be_changed(model: nn.Module) -> None:
    config = zoo.data_config(zoo.load(NAME))
    assert config["input_size"] == model.pretrained_cfg["input_size"]
    changed = zoo.data_config(model, input_size=(3, 40, 40), crop_pct=1.0, mean=None)
    assert zoo.transform(changed)(Image.new("RGB", (50, 60))).shape == (3, 40, 40)
    assert changed["mean"] == config["mean"]


def test_arguments_of_the_architecture_set_the_size_of_images() -> None:
    vit = zoo.load("timm:test_vit", img_size=32, in_chans=1)
    config = zoo.data_config(vit, mean=(0.5,), std=(0.5,))
    assert config["input_size"] == (1, 32, 32)
    assert vit(torch.zeros(1, *config["input_size"])).shape == (1, 1000)
    with pytest.raises(OptionError, match="images of 1 channels need 1 values"):
        zoo.data_config(vit)


def test_local_folder_through_timm(model: nn.Module, tmp_path: Path) -> None:
    config = {"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": {"num_classes": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, checkpoint in ((f"local-dir:{tmp_path}", None), (None, f"local-dir:{tmp_path}"), (NAME, str(tmp_path))):
        assert same(zoo.load(name, checkpoint), model)
    with pytest.raises(CheckpointError, match=r"of another architecture than timm:resnet18: timm:test_resnet"):
        zoo.load("timm:resnet18", f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:resnet51", "timm:resnet50"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("resnet50", "did you mean timm:resnet50, torchvision:resnet50?"),
        ("huggingface:resnet50", "did you mean timm:resnet50"),
        ("zzzzqqqq", "give timm:NAME"),
    ],
)
def test_unknown_names_get_near_ones(name: str, hint: str) -> None:
    with pytest.raises(OptionError, match="there is no model") as caught:
        zoo.load(name)
    assert hint in str(caught.value)


def test_tag_of_pretrained_weights_is_a_name() -> None:
    assert zoo.data_config(zoo.load("timm:test_vit.r160_in1k"))["input_size"] == (3, 160, 160)


def test_wrong_architecture_names_the_keys(model: nn.Module, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError) as caught:
        zoo.load(NAME, tmp_path / "vit.pth")
    text = str(caught.value)
    assert "vit.pth does not fit timm:test_resnet" in text
    assert "names missing (conv1.0.weight" in text
    assert "names unknown to the model (cls_token" in text


def test_other_shapes_are_named_with_both(model: nn.Module, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["conv1.0.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="1 name of another shape") as caught:
        zoo.load(NAME, tmp_path / "a.pth")
    assert f"conv1.0.weight (8, 3, 3, 3) in the file, {tuple(model.conv1[0].weight.shape)}" in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run!",))


def _pickle(path: Path) -> None:
    torch.save({"state_dict": Evil()}, path)


def _truncated(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])


def _empty(path: Path) -> None:
    torch.save({"epoch": 3}, path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder without a config.json"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (_pickle, "without running code"),
        (_truncated, "may be cut short"),
        (_empty, "holds no weights"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_bad_checkpoints(
    tmp_path: Path, make: Callable[[Path], Any], says: str, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.{ending}"
    make(path)
    if ending == "safetensors" and make in (_pickle, _truncated, _empty):
        says = "cannot be read"
    with pytest.raises(CheckpointError, match=says) as caught:
        zoo.load(NAME, path)
    assert str(path) in str(caught.value)
    assert "run!" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "call",
    [
        lambda tmp: zoo.load(NAME, bogus=1),
        lambda tmp: zoo.load("torchvision:resnet18", bogus=1),
        lambda tmp: zoo.load(None, tmp / "a.pth"),
        lambda tmp: zoo.load(f"local-dir:{tmp}"),
        lambda tmp: zoo.load("local-dir:/no/such/folder"),
    ],
)
def test_other_mistakes_are_our_errors(call: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(FxzipError):
        call(tmp_path)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_names_are_known_without_their_library(library: str) -> None:
    known = set(timm.list_models() if library == "timm" else torchvision.models.list_models())
    assert len(known) > 50
    assert known <= written_models(library)
