"""What travels with a merged network: how images are prepared, names of classes; and predictions by these names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import PixelWarning, PreparationWarning
from fxzip.information import Information, Preparation, labels_of
from fxzip.io import plan_hash
from fxzip.zoo import transform
from tests.nets import Net, chain, conv
from tests.oracles import difference, images

X = torch.randn(8, 3, 32, 32)
LABELS = {"dogs": ("beagle", "pug", "collie"), "birds": ("wren", "owl", "tit", "jay")}
CONFIG: dict[str, Any] = {
    "input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic",
    "crop_pct": 0.8, "crop_mode": "center",
}  # fmt: skip


def model(classes: int, **config: Any) -> nn.Module:
    made = timm.create_model("test_resnet", num_classes=classes).eval()
    made.pretrained_cfg = {**CONFIG, "input_size": (3, 160, 160), **config}
    return made


def merged(*models: nn.Module, **options: Any) -> fxzip.ZippedModel:
    settings: dict[str, Any] = {"names": tuple(LABELS), "refit": False, "verify": False, "progress": False}
    return fxzip.zip(*models, [X], method="select", **{**settings, **options})


@pytest.fixture(scope="module")
def zipped() -> fxzip.ZippedModel:
    torch.manual_seed(0)
    return merged(model(3, label_names=LABELS["dogs"]), model(4), labels={"birds": LABELS["birds"]})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_it_comes_from_the_models_and_from_the_user(zipped: fxzip.ZippedModel) -> None:
    assert zipped.labels == LABELS
    assert zipped.information.preparation.config == CONFIG  # the size is that of the images that it was merged on
    assert zipped.select(["birds"]).labels == {"birds": LABELS["birds"]}
    with pytest.raises(fxzip.OptionError, match="labels has 'cats', and the tasks are dogs, birds"):
        merged(model(3), model(4), labels={"cats": ["x"]})


def test_transformers_names() -> None:
    network = Net(chain, conv1=conv(3, 3))
    network.config = SimpleNamespace(id2label={0: "a", 1: "b"})
    assert labels_of(network) == ("a", "b")
    network.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert labels_of(network) is None


def test_it_is_saved_and_shown(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    loaded = fxzip.load(zipped.save(tmp_path / "m"))
    assert loaded.information == zipped.information
    card = (tmp_path / "m" / "README.md").read_text()
    assert "3 classes, `beagle`, `pug`, `collie`" in card
    assert "mean: `(0.5, 0.4, 0.3)`" in card


def test_a_folder_without_it_is_read(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    change(zipped.save(tmp_path / "m"), lambda plan: plan.pop("information"))
    assert fxzip.load(tmp_path / "m").information == Information()


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a plan, with a hash that is right."""
    plan = json.loads((folder / "fxzip.json").read_text())
    edit(plan)
    plan["sha256"] = plan_hash(plan)
    (folder / "fxzip.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("input_size", [3, 100_000, 100_000], "not that of an image"),
        ("input_size", [3, 0, 4], "not that of an image"),
        ("input_size", ["3", 4, 4], "cannot be '3'"),
        ("mean", [0.5, "nan", 0.5], "not one number for each channel"),
        ("std", [0.0, 1.0, 1.0], "the std is 0"),
        ("interpolation", "__import__", "no interpolation"),
        ("crop_pct", 1e-9, "the crop share"),
        ("crop_mode", "../..", "no crop mode"),
    ],
)
def test_a_strangers_preparation_is_bounded(
    zipped: fxzip.ZippedModel, tmp_path: Path, key: str, value: Any, says: str
) -> None:
    change(zipped.save(tmp_path / "m"), lambda plan: plan["information"]["preparation"].update({key: value}))
    with pytest.raises(fxzip.FileFormatError, match=says):
        fxzip.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("labels", "says"),
    [({"cats": ["a"]}, "no task"), ({"dogs": ["x" * 2000]}, "more than 1,000"), ({"dogs": [1]}, "cannot be 1")],
)
def test_a_strangers_labels_are_bounded(zipped: fxzip.ZippedModel, tmp_path: Path, labels: Any, says: str) -> None:
    change(zipped.save(tmp_path / "m"), lambda plan: plan["information"].update(labels=labels))
    with pytest.raises(fxzip.FileFormatError, match=says):
        fxzip.load(tmp_path / "m")


def test_what_could_not_be_loaded_is_not_saved(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    network = zipped.select(zipped.names)
    network.information = Information(Preparation(std=(0.0,)))
    with pytest.raises(fxzip.SaveError, match="the std is 0"):
        network.save(tmp_path / "m")


def test_models_that_say_odd_things_of_themselves() -> None:
    odd = model(3)
    odd.pretrained_cfg = {"mean": "grey", "input_size": 7}
    assert merged(odd, model(4)).information.preparation == Preparation()


# ---- predictions


def test_predictions_are_the_networks_own(zipped: fxzip.ZippedModel, picture: Path) -> None:
    with Image.open(picture) as image:
        x = transform(CONFIG)(image.convert("RGB"))[None]
        with torch.no_grad():
            chances = {task: zipped(x, task=task).softmax(1)[0] for task in LABELS}
        for given in (picture, str(picture), image, x, x[0]):
            found = zipped.predict(given, top=2)
            assert list(found) == list(LABELS)
            for task, best in found.items():
                assert len(best) == 2
                assert best[0].score > best[1].score
                assert best[0].number == int(chances[task].argmax())
                assert best[0].label == LABELS[task][best[0].number]
                assert best[0].score == pytest.approx(float(chances[task].max()), abs=1e-6)
    assert list(zipped.predict(picture, task="birds")) == ["birds"]
    assert len(zipped.predict(picture, task="birds", top=9)["birds"]) == 4


def test_classes_without_names_have_numbers(zipped: fxzip.ZippedModel, picture: Path) -> None:
    network = zipped.select(zipped.names)
    network.information = Information(zipped.information.preparation)
    best = network.predict(picture)["dogs"][0]
    assert best.label == str(best.number)


def test_what_cannot_be_predicted_is_told(zipped: fxzip.ZippedModel, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no image")
    for wrong in (tmp_path / "no.png", tmp_path / "none.png"):
        with pytest.raises(fxzip.OptionError, match=r"cannot be read as an image"):
            zipped.predict(wrong)
    with pytest.raises(fxzip.OptionError, match="is not one image"):
        zipped.predict(X)
    with pytest.raises(fxzip.OptionError, match="no task"):
        zipped.predict(picture, task="cats")
    with pytest.raises(fxzip.OptionError, match="top=0"):
        zipped.predict(picture, top=0)
    network = zipped.select(zipped.names)
    network.information = Information()
    with pytest.raises(fxzip.OptionError, match="not known \\(input_size, mean, std\\)"):
        network.predict(picture)
    dense = merged(*(Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 4), b=conv(4, 2)) for _ in range(2)))
    with pytest.raises(fxzip.OptionError, match="not a score for each class"):
        dense.predict(X[0])


# ---- images that were prepared otherwise


def test_other_preparations_are_noticed() -> None:
    with pytest.warns(PreparationWarning, match=r"for dogs than for birds \(mean .*renormalise"):
        merged(model(3), model(4, mean=(0.1, 0.1, 0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PreparationWarning)
        merged(model(3), model(4))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "BatchNorm"])
def test_renormalise_is_exact_without_padding(bias: bool) -> None:
    layers = {"a": nn.Conv2d(3, 6, 3, bias=bias), "norm": nn.BatchNorm2d(6), "relu": nn.ReLU(), "head": nn.Linear(6, 2)}
    network = Net(chain, **layers).double().eval()
    network.norm.running_mean.normal_()
    old, new = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    pixels = images(3, 12).double()

    def prepared(mean: Any, std: Any) -> torch.Tensor:
        return (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)

    changed = fxzip.renormalise(network, *old, *new)
    with torch.no_grad():
        assert difference(network(prepared(*old)), changed(prepared(*new))) < 1e-6
        assert difference(network(prepared(*old)), network(prepared(*new))) > 1e-2
    assert changed.state_dict().keys() == network.state_dict().keys()


def test_what_cannot_be_renormalised_is_told() -> None:
    args = ((0.5,) * 3, (0.5,) * 3, (0.1,) * 3, (0.5,) * 3)
    with pytest.raises(fxzip.OptionError, match="neither a bias nor a BatchNorm"):
        fxzip.renormalise(Net(chain, a=conv(3, 6, bias=False), relu=nn.ReLU(), head=nn.Linear(6, 2)), *args)
    two = Net(lambda m, x: m.a(x) + m.b(x), a=conv(3, 6), b=conv(3, 6))
    with pytest.raises(fxzip.OptionError, match="does not begin with one convolution"):
        fxzip.renormalise(two, *args)
    around = Net(lambda m, x: m.a(x) + x.sum(1, keepdim=True), a=conv(3, 6))
    with pytest.raises(fxzip.OptionError, match="cannot be folded into the first layer"):
        fxzip.renormalise(around, *args)


# ---- ONNX


def test_an_onnx_file_says_what_it_is(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = zipped.export(tmp_path / "m.onnx")
    assert done.difference < 1e-4
    written = onnx.load(tmp_path / "m.onnx")
    props = {prop.key: json.loads(prop.value) for prop in written.metadata_props}
    assert props["fxzip.tasks"] == ["dogs", "birds"]
    assert {task: tuple(names) for task, names in props["fxzip.labels"].items()} == LABELS
    assert tuple(props["fxzip.preparation"]["mean"]) == CONFIG["mean"]
    for value in (*written.graph.input, *written.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [value.name for value in written.graph.output] == ["dogs", "birds"]
    names = {tensor.name for tensor in written.graph.initializer}
    assert "trunk.layer1.0.conv1.weight" in names
    nodes = [node.name for node in written.graph.node]
    assert len(set(nodes)) == len(nodes)
    assert any(name.startswith("trunk.layer1.0.") for name in nodes)
    assert "served" not in str(written)
    assert str(Path(fxzip.__file__).parent) not in str(written)  # no paths of this machine
    onnx.checker.check_model(written)


# ---- pixels of another scale


class Colours(nn.Module):
    """Learned on pixels of 0 to 1: its BatchNorm's statistics are of these."""

    def __init__(self, classes: int, function: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv(3, 6), nn.BatchNorm2d(6), nn.Linear(6, classes)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, n = self.conv(x), self.norm
        if self.function:
            return self.head(F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias).relu().mean((2, 3)))
        return self.head(n(x).relu().mean((2, 3)))


def trained(classes: int, scale: float, function: bool = False) -> nn.Module:
    network = Colours(classes, function).double()
    network.norm.momentum = None
    network.norm.train()
    network.norm(network.conv(scale * torch.rand(32, 3, 12, 12).double()))
    return network.eval()


@pytest.mark.parametrize("function", [False, True])
def test_pixels_of_another_scale_are_noticed(function: bool) -> None:
    pixels = torch.rand(8, 3, 12, 12).double()
    options: dict[str, Any] = {"refit": False, "verify": False, "progress": False, "names": ("dogs", "birds")}
    ones, large = [[trained(n, scale, function) for n in (3, 4)] for scale in (1.0, 255.0)]
    with pytest.warns(PixelWarning, match=r"dogs seems to get pixels of 0 to 255 where it was trained on 0 to 1.*norm"):
        fxzip.zip(*ones, [(255 * pixels)], **options)
    with pytest.warns(PixelWarning, match=r"birds seems to get pixels of 0 to 1 where it was trained on 0 to 255"):
        fxzip.zip(*large, [pixels], **options)
    with pytest.warns(PixelWarning, match="another scale"):
        fxzip.prepare(*ones, example_inputs=20 * pixels, names=("dogs", "birds"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PixelWarning)
        fxzip.zip(*ones, [pixels], **options)
        fxzip.zip(*large, [255 * pixels], **options)
        fxzip.zip(Colours(3).double().eval(), Colours(4).double().eval(), [255 * pixels], **options)  # not trained yet
        fxzip.zip(*ones, [(pixels - 0.45) / 0.22], **options)  # normalised otherwise: not wrong by so much
