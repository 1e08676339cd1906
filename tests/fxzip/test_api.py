"""What users call: zip, prepare, observe, convert, analyse, and what they give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from tests.nets import Net, Residual, chain, conv, pair, permuted_copy, places, untouched
from tests.oracles import TOLERANCE, call, difference, images, randomise, self_zip_errors

X = images(12, 12)


def ensemble_error(models: list[nn.Module]) -> float:
    """What a zip with an empty trunk is off the ensemble."""
    zipped = fxzip.zip(*models, [X], cut=0.0, progress=False)
    assert not list(zipped.trunk.parameters())
    return difference(tuple(call(model, X) for model in models), call(zipped, X))


class Counting:
    """A loader that counts how often it is read."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter(self.batches)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return pair(Residual, X, 3)


@pytest.fixture(scope="module")
def prepared(models: list[nn.Module]) -> fxzip.Prepared:
    return fxzip.prepare(*models[:2], example_inputs=X).observe([X[:6], X[6:]], progress=False)


# ---- zip


def test_zip_two_models(models: list[nn.Module]) -> None:
    a, b, _ = models
    with untouched(a, b):
        zipped = fxzip.zip(a, b, [X], progress=False)
    assert not zipped.training
    outputs = call(zipped, X)
    assert [tuple(out.shape) for out in outputs] == [(12, 5), (12, 5)]
    assert all(out.isfinite().all() for out in outputs)
    assert difference(call(a, X), outputs[0]) > 1e-3  # the trunk is shared indeed
    assert zipped.names == ("task0", "task1")


def test_zip_three_models(models: list[nn.Module]) -> None:
    zipped = fxzip.zip(*models, [X], names=("x", "y", "z"), progress=False)
    assert list(zipped.heads) == ["x", "y", "z"]
    assert len(call(zipped, X)) == 3
    assert len(zipped.report.before) == 3


@pytest.mark.parametrize("method", ["zip", "permute", "average"])
def test_three_permuted_copies_are_the_network_again(models: list[nn.Module], method: str) -> None:
    a = models[0]
    spec = fxzip.analyse(a, X)
    copies = [a, a, a] if method == "average" else [a, spec.permute(a), spec.permute(a)]
    prepared = fxzip.prepare(*copies, example_inputs=X).observe([X], progress=False)
    options = {"alpha": 1.0, "beta": 0.0} if method == "zip" else {}
    zipped = prepared.convert(method=method, refit=False, reset_batch_norm=False, progress=False, **options)
    assert max(difference(call(a, X), out) for out in call(zipped, X)) < TOLERANCE


LABELS = torch.arange(6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, LABELS),
        lambda x: [x, LABELS],
        lambda x: {"x": x},
        lambda x: ({"x": x}, LABELS),
    ],
    ids=["tensor", "tuple", "list", "dict", "tuple of dict"],
)
def test_what_the_loader_may_give(models: list[nn.Module], wrap: Callable[[Tensor], Any]) -> None:
    plain = fxzip.zip(*models[:2], [X[:6], X[6:]], progress=False)
    wrapped = fxzip.zip(*models[:2], loader=[wrap(X[:6]), wrap(X[6:])], progress=False)
    assert difference(call(plain, X), call(wrapped, X)) == 0
    assert difference(call(wrapped, X), call(wrapped, {"x": X})) == 0


def test_a_data_loader(models: list[nn.Module]) -> None:
    data = torch.utils.data.TensorDataset(X, torch.zeros(12))
    zipped = fxzip.zip(*models[:2], torch.utils.data.DataLoader(data, batch_size=5), progress=False)
    assert len(call(zipped, X)) == 2


def test_a_task_runs_the_trunk_and_its_own_head_only(models: list[nn.Module]) -> None:
    zipped = fxzip.zip(*models[:2], [X], names=("dogs", "birds"), progress=False)
    ran: list[str] = []
    for name, head in zipped.heads.items():
        head.register_forward_hook(lambda *_, name=name: ran.append(name))
    birds = zipped(X, task="birds")
    assert ran == ["birds"]
    assert torch.equal(birds, zipped(X)[1])
    with pytest.raises(fxzip.OptionError, match=r"no task 'cats'.*dogs, birds"):
        zipped(X, task="cats")


def test_trunk_and_heads_keep_the_layers_names(models: list[nn.Module]) -> None:
    zipped = fxzip.zip(*models[:2], [X], cut="layer2", names=("dogs", "birds"), refit=False, progress=False)
    assert isinstance(zipped.trunk, fx.GraphModule)
    assert all(isinstance(head, fx.GraphModule) for head in zipped.heads.values())
    keys = set(zipped.state_dict())
    original = set(models[0].state_dict())
    later = {key for key in original if key.startswith(("layer2.", "fc."))}
    assert {key.removeprefix("trunk.") for key in keys if key.startswith("trunk.")} == original - later
    for name in ("dogs", "birds"):
        own = {key.removeprefix(f"heads.{name}.") for key in keys if key.startswith(f"heads.{name}.")}
        assert {key for key in own if not key.startswith("unmerge_")} == later
    assert all(key.startswith(("trunk.", "heads.dogs.", "heads.birds.")) for key in keys)


def test_a_zipped_model_can_be_copied_and_its_state_loaded(models: list[nn.Module]) -> None:
    zipped = fxzip.zip(*models[:2], [X], cut="layer2", progress=False)
    other = fxzip.zip(*models[1:], [X], cut="layer2", method="average", progress=False)
    twin = copy.deepcopy(zipped)
    assert difference(call(zipped, X), call(twin, X)) == 0
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(zipped.state_dict())
    assert difference(call(zipped, X), call(twin, X)) == 0
    assert difference(call(zipped, X), call(other, X)) > 1e-3


# ---- prepare, observe, convert


def test_one_observing_pass_serves_every_merge(models: list[nn.Module]) -> None:
    loader = Counting(X[:6], X[6:])
    prepared = fxzip.prepare(*models[:2], example_inputs=X)
    assert loader.reads == 0
    prepared.observe(loader, progress=False)
    assert loader.reads == 1
    for cut in (None, "layer2", 0.5):
        for method in ("zip", "permute", "average"):
            prepared.convert(cut=cut, method=method, refit=False, reset_batch_norm=False, progress=False)
    assert loader.reads == 1
    zipped = prepared.convert(method="zip", refit=False, progress=False)  # BatchNorm is reset on the loader
    assert loader.reads == 2
    assert zipped.report.recalibrated == 5
    assert loader.reads == 2


def test_merges_from_one_pass_are_those_of_zip(models: list[nn.Module], prepared: fxzip.Prepared) -> None:
    for cut, method, options in (("layer2", "zip", {"alpha": 0.1, "beta": 0.5}), (None, "permute", {})):
        zipped = prepared.convert(cut=cut, method=method, progress=False, **options)
        again = prepared.convert(cut=cut, method=method, progress=False, **options)
        at_once = fxzip.zip(*models[:2], [X[:6], X[6:]], cut=cut, method=method, progress=False, **options)
        assert difference(call(at_once, X), call(zipped, X)) < TOLERANCE
        assert difference(call(again, X), call(zipped, X)) == 0


def test_moments_are_kept_and_replaced(models: list[nn.Module]) -> None:
    prepared = fxzip.prepare(*models[:2], example_inputs=X).observe([X], progress=False)
    last = {name: moments.count for name, moments in prepared.moments.items()}
    assert set(last) == {space.name for space in prepared.spec.spaces}
    every = prepared.observe([X], points="all", progress=False).moments
    assert every["stem"].count > last["stem"]


def test_cuts_are_listed_by_the_users_names(prepared: fxzip.Prepared) -> None:
    names = prepared.cuts
    for name in ("norm", "layer1", "layer1.conv2", "layer1.gate", "layer2", "layer2.shortcut", "fc"):
        assert name in names
    assert list(names) == sorted(names, key=places(prepared).__getitem__)
    for name in names:
        assert prepared.place(name) <= prepared.place(None)


def test_the_spec_prints(prepared: fxzip.Prepared) -> None:
    text = str(prepared.spec)
    assert f"{len(prepared.spec.spaces)} channel spaces cover" in " ".join(text.split())
    for space in prepared.spec.spaces:
        assert space.name in text
        assert str(space.size) in text
    assert prepared.spec.coverage > 0.9
    assert prepared.spec["stem"].size == 8
    with pytest.raises(KeyError, match=r"no channel space 'foo'.*layer2"):
        prepared.spec["foo"]


# ---- the report


def test_the_report_is_a_table(prepared: fxzip.Prepared) -> None:
    zipped = prepared.convert(method="zip", alpha=0.1, beta=0.5, refit=False, progress=False)
    report, text = zipped.report, str(zipped.report)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    for row in report.spaces:
        assert lines[row.name] == [
            str(row.size),
            str(row.sites),
            f"{row.correlation:.3f}",
            f"{row.within:.1%}",
        ]
        assert 0 < (row.correlation or 0) <= 1
    assert any(row.within > 0 for row in report.spaces)
    assert {row.name for row in report.spaces} == {space.name for space in prepared.spec.spaces}
    ratio = report.params_after / report.params_before
    assert lines["parameters"][-1] == f"{ratio:.3f}"
    assert lines["FLOPs"][-1] == f"{report.flops_after / report.flops_before:.3f}"
    assert "zip(alpha=0.1, beta=0.5)" in text
    assert "cut at fc" in text
    assert report.recalibrated == 5


def test_a_full_zip_costs_one_trunk(models: list[nn.Module], prepared: fxzip.Prepared) -> None:
    report = prepared.convert(method="permute", refit=False, progress=False).report
    fc = 2 * 12 * 5
    assert report.before[0].flops == report.before[1].flops
    assert report.trunk.flops == report.before[0].flops - fc
    assert [head.flops for head in report.heads] == [fc, fc]
    assert report.params_before == 2 * sum(p.numel() for p in models[0].parameters())
    assert report.params_after == report.params_before // 2 + 12 * 5 + 5
    partial = prepared.convert(cut="layer2", method="permute", progress=False).report
    assert report.flops_after < partial.flops_after < partial.flops_before
    assert partial.cut == "layer2"
    average = prepared.convert(method="average", progress=False).report
    for mine, plain in zip(report.spaces, average.spaces, strict=True):
        assert mine.correlation >= plain.correlation
        assert mine.within == 0
    assert any(a.correlation > b.correlation for a, b in zip(report.spaces, average.spaces, strict=True))


def test_class_counts_part_at_the_classifier() -> None:
    a, b = pair(lambda: Residual(120), X, 1) + pair(lambda: Residual(37), X, 1)
    zipped = fxzip.zip(a, b, [X], progress=False)
    assert [out.shape[1] for out in call(zipped, X)] == [120, 37]
    assert zipped.report.cut == "fc"
    assert "120" in str(zipped.report)
    assert {key for key in zipped.state_dict() if key.endswith("fc.weight")} == {
        "heads.task0.fc.weight",
        "heads.task1.fc.weight",
    }
    named = fxzip.zip(a, b, [X], cut="fc", progress=False)  # where they part has a name, too
    assert difference(call(zipped, X), call(named, X)) == 0


# ---- cuts


@pytest.mark.parametrize("method", ["permute", "zip"])
def test_any_node_is_a_cut(method: str) -> None:
    errors = self_zip_errors(randomise(Residual(), X), X, methods=(method,))
    assert len(errors) == 34  # all nodes but the image
    assert {cut: error for cut, error in errors.items() if error > TOLERANCE} == {}


def test_every_place_has_the_names_of_its_node_and_of_the_modules_that_begin_there(
    prepared: fxzip.Prepared,
) -> None:
    assert prepared.places.cuts.valid == tuple(range(1, len(prepared.alignment.shared) + 1))
    named = places(prepared)
    nodes = {
        "relu",
        "layer1_gate_up",
        "mul",
        "sigmoid",
        "add",
        "max_pool2d",
        "flatten",
        "layer1.gate.down",
        "fc",
    }
    assert nodes <= named.keys()
    assert named["layer2"] == named["layer2.conv1"] == named["layer2_conv1"] == named["max_pool2d"] + 1
    assert named["layer1.gate"] == named["layer1.gate.down"] - 1  # it begins with the mean


def test_a_share_of_the_layers(prepared: fxzip.Prepared) -> None:
    layers = 11  # stem, two and two of the gate in both blocks, the shortcut, fc
    assert len(prepared.places.cuts.layers) == layers
    for share in (0.0, 0.25, 0.5, 0.75, 1, 1.0):
        zipped = prepared.convert(cut=share, method="permute", progress=False)
        found = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in zipped.trunk.modules())
        assert found == min(round(share * layers), layers - 1)


def test_an_empty_trunk_is_the_ensemble(models: list[nn.Module]) -> None:
    assert ensemble_error(models) == 0
    first = fxzip.zip(*models, [X], cut="stem", progress=False)
    assert max(difference(call(m, X), out) for m, out in zip(models, call(first, X), strict=True)) == 0


class Standardised(nn.Module):
    """Statistics of the images are the model's own, and come before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.rest = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(x) * self.scale)


def test_an_empty_trunk_holds_nothing_at_all() -> None:
    models = pair(Standardised, X)
    models[1].norm.running_mean += 1
    assert ensemble_error(models) == 0


# ---- kinds of models


def test_graph_modules() -> None:
    a, b = (fx.symbolic_trace(model) for model in pair(Residual, X))
    with untouched(a, b):
        zipped = fxzip.zip(a, b, [X], progress=False)
    assert zipped.report.traced_by == ("given", "given")
    assert len(call(zipped, X)) == 2
    assert max(self_zip_errors(a, X, step=5).values()) < TOLERANCE


def test_in_place_activations_of_a_graph_module_reach_no_other_head() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.SiLU(inplace=True), conv(8, 6), nn.Hardswish(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip

    graph = fx.symbolic_trace(randomise(make(), X))
    errors = self_zip_errors(graph, X)
    assert {"2", "4"} <= errors.keys()
    assert max(errors.values()) < TOLERANCE


def test_bfloat16() -> None:
    a, b = (model.to(torch.bfloat16) for model in pair(Residual, X))
    x = X.to(torch.bfloat16)
    zipped = fxzip.zip(a, b, [x], cut="layer2", progress=False)
    assert {t.dtype for t in (*zipped.parameters(), *zipped.buffers()) if t.is_floating_point()} == {torch.bfloat16}
    out = call(zipped, x)
    assert out[0].dtype == torch.bfloat16
    wide = fxzip.zip(*(copy.deepcopy(m).double() for m in (a, b)), [x.double()], cut="layer2", progress=False)
    assert difference(call(wide, x.double()), call(zipped, x)) < 0.3


def test_channels_last() -> None:
    a, b = pair(Residual, X)
    plain = fxzip.zip(a, b, [X], cut="layer2", progress=False)
    a, b = (model.to(memory_format=torch.channels_last) for model in (a, b))
    x = X.to(memory_format=torch.channels_last)
    zipped = fxzip.zip(a, b, [x], cut="layer2", progress=False)
    weight = zipped.get_parameter("trunk.layer1.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert difference(call(plain, X), call(zipped, x)) < 1e-6


class FunctionalNorm(nn.Module):
    """BatchNorm as a function with its statistics as buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.rand(width))
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.1, 1e-5)


def test_batch_norm_as_a_function() -> None:
    model = randomise(Residual(norm=FunctionalNorm), X)
    assert max(self_zip_errors(model, X, step=5).values()) < TOLERANCE
    a, b = pair(lambda: Residual(norm=FunctionalNorm), X)
    prepared = fxzip.prepare(a, b, example_inputs=X).observe([X], progress=False)
    assert "layer1.norm1" in prepared.cuts
    before = prepared.convert(refit=False, reset_batch_norm=False, progress=False)
    zipped = prepared.convert(refit=False, progress=False)
    assert zipped.report.recalibrated == 5
    seen: list[Tensor] = []
    zipped.trunk.stem.register_forward_hook(lambda *args: seen.append(args[2]))
    call(zipped, X)
    assert difference(seen[0].mean((0, 2, 3)), zipped.get_buffer("trunk.norm.running_mean")) < TOLERANCE
    assert difference(before.get_buffer("trunk.norm.running_mean"), zipped.get_buffer("trunk.norm.running_mean")) > 1e-3


def test_no_batch_norm_reads_the_loader_no_second_time() -> None:
    a, b = pair(lambda: Residual(norm=lambda _: nn.Identity()), X)
    loader = Counting(X)
    prepared = fxzip.prepare(a, b, example_inputs=X).observe(loader, progress=False)
    zipped = prepared.convert(method="zip", refit=False, progress=False)
    assert zipped.report.recalibrated == 0
    assert loader.reads == 1
    assert max(self_zip_errors(a, X, step=5).values()) < TOLERANCE


class TwoInputs(nn.Module):
    """Images, and a mask that comes in again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Any]:
        x = F.relu(self.a(image * mask))
        x = F.relu(self.b(x)) * mask
        return {"logits": self.head(x.mean((2, 3))), "mask": mask, "deep": [mask.mean(), None]}


def test_two_inputs_and_a_dict_as_output() -> None:
    inputs = {"image": X, "mask": (X[:, :1] > 0).double()}
    a, b = (randomise(TwoInputs(), inputs, seed) for seed in (0, 1))
    zipped = fxzip.zip(a, b, [inputs], progress=False)
    out_a, out_b = call(zipped, inputs)
    assert out_a["logits"].shape == out_b["logits"].shape == (12, 3)
    assert torch.equal(out_a["mask"], inputs["mask"])
    assert out_b["deep"][1] is None
    assert difference((out_a, out_b), call(zipped, tuple(inputs.values()))) == 0
    assert max(self_zip_errors(a, inputs).values()) < TOLERANCE
    prepared = fxzip.prepare(a, b, example_inputs=tuple(inputs.values()))
    assert prepared.cuts == fxzip.prepare(a, b, example_inputs=inputs).cuts


def test_a_permuted_copy_of_analyse() -> None:
    model = randomise(Residual(), X)
    spec = fxzip.analyse(model, X)
    with untouched(model):
        same = spec.permute(model, torch.Generator().manual_seed(0))
    assert isinstance(same, Residual)
    assert not torch.equal(same.stem.weight, model.stem.weight)
    assert difference(call(model, X), call(same, X)) < TOLERANCE


def test_a_segmentation_head_beside_a_classifier() -> None:
    classifier = torchvision.models.resnet50(num_classes=3).eval()
    segmenter = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
    x = images(2, 32).float()
    with untouched(classifier, segmenter):
        prepared = fxzip.prepare(classifier, segmenter, example_inputs=x, names=("class", "pixel"))
        prepared.observe([x], progress=False)
        zipped = prepared.convert(method="permute", refit=False, progress=False)
    assert zipped.report.cut == "layer3.0.conv2"  # from here on one has strides, the other dilation
    assert "layer3.0.conv2" in (zipped.report.parting or "")
    assert "trunk.layer3.0.conv1.weight" in zipped.state_dict()
    assert "heads.pixel.backbone.layer3.0.conv2.weight" in zipped.state_dict()
    classes, pixels = call(zipped, x)
    assert classes.shape == (2, 3)
    assert pixels["out"].shape == (2, 4, 32, 32)
    ensemble = prepared.convert(cut=0.0, method="permute", progress=False)
    assert difference((call(classifier, x), call(segmenter, x)), call(ensemble, x)) == 0


def test_a_functional_step_is_a_cut_by_its_nodes_name() -> None:
    deep = Net(chain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 6), act2=nn.ReLU(), head=nn.Linear(6, 3))
    a = randomise(deep, X)
    prepared = fxzip.prepare(a, permuted_copy(a, X), example_inputs=X)
    assert prepared.cuts == ("a", "act", "b", "act2", "mean", "head")
