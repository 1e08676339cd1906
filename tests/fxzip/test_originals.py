"""`as_models`: merged weights in the models' own classes, with their own keys."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.restore.moves import moved_back
from tests.nets import Net, Residual, chain, conv, pair, untouched
from tests.oracles import call, difference, images

X = images(24, 12)
QUICK = fxzip.RefitOptions(rounds=0, ridge=1e-3)
NO_NEW_BIASES = fxzip.RefitOptions(rounds=0, ridge=1e-3, biases=False)


def merged(models: list[nn.Module], x: Any = X, **options: Any) -> fxzip.ZippedModel:
    options = {"refit": QUICK, "method": "select", "hold_back": False, "verify": False, "progress": False, **options}
    return fxzip.zip(*models, [x], **options)


def errors(zipped: fxzip.ZippedModel, x: Any = X) -> list[float]:
    """What each model is off the merged network."""
    return [difference(call(zipped, x)[i], call(model, x)) for i, model in enumerate(zipped.as_models().values())]


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return pair(Residual, X)


@pytest.mark.parametrize("refit", [QUICK, False], ids=["refit", "paper's rule"])
@pytest.mark.parametrize("cut", [None, "layer2", 0.5])
def test_the_models_own_classes_compute_what_the_graph_does(models: list[nn.Module], cut: Any, refit: Any) -> None:
    with untouched(*models):
        zipped = merged(models, cut=cut, refit=refit)
        made = zipped.as_models()
        assert max(errors(zipped)) < 1e-12
    assert list(made) == list(zipped.names)
    for own, model in zip(models, made.values(), strict=True):
        assert type(model) is Residual
        assert model.state_dict().keys() == own.state_dict().keys()
        assert not model.training
        fresh = Residual().double().eval()
        fresh.load_state_dict(model.state_dict())
        assert difference(call(model, X), call(fresh, X)) == 0
        assert difference(call(own, X), call(model, X)) > 1e-6  # they are the merged weights indeed


def test_the_trunk_is_in_memory_once(models: list[nn.Module]) -> None:
    zipped = merged(models)
    a, b = zipped.as_models().values()
    tensors = {t.data_ptr(): t.numel() for m in (a, b) for t in m.parameters()}
    heads = sum(p.numel() for head in zipped.heads.values() for p in head.parameters())
    trunk = sum(p.numel() for name, p in a.named_parameters() if not name.startswith("fc."))
    assert sum(tensors.values()) == trunk + heads
    assert a.stem.weight is b.stem.weight
    assert a.fc.weight is not b.fc.weight
    assert a.stem.weight.data_ptr() not in {p.data_ptr() for p in zipped.parameters()}


def test_what_was_folded_is_neutral(models: list[nn.Module]) -> None:
    a = next(iter(merged(models).as_models().values()))
    assert torch.equal(a.norm.running_mean, torch.zeros(8).double())
    assert torch.equal(a.norm.running_var, torch.ones(8).double())
    assert torch.allclose(a.norm.weight, torch.full((8,), 1 + a.norm.eps).double().sqrt())


def test_gradients_go_where_the_parents_went(models: list[nn.Module]) -> None:
    frozen = copy.deepcopy(models)
    for model in frozen:
        model.stem.requires_grad_(False)
    made = merged(frozen).as_models().values()
    for model in made:
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"stem.weight", "stem.bias"}
    call_with_gradients = next(iter(made))(X).sum()
    call_with_gradients.backward()


def test_three_models(models: list[nn.Module]) -> None:
    zipped = merged(pair(Residual, X, 3), names=("x", "y", "z"))
    assert list(zipped.as_models()) == ["x", "y", "z"]
    assert max(errors(zipped)) < 1e-12


def test_models_of_other_names(models: list[nn.Module]) -> None:
    """The second model's layers lie inside another module, its head is wider."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Residual(classes=3)

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    other = pair(Wrapped, X)[1]
    made = list(merged([models[0], other]).as_models().values())
    assert type(made[1]) is Wrapped
    assert made[1].state_dict().keys() == other.state_dict().keys()
    assert made[1].body.stem.weight is made[0].stem.weight


# ---- what holds the biases and what is constant


class Body(nn.Module):
    """Layers with lines behind them, as a function of the module and the input."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.a, self.norm, self.head = conv(3, 6, bias=False), nn.BatchNorm2d(6, affine=affine), nn.Linear(6, 4)
        self.b = nn.Linear(6, 6)
        self.scale, self.shift = nn.Parameter(torch.randn(6, 1, 1)), nn.Parameter(torch.randn(1, 6, 1, 1))
        self.register_buffer("steady", torch.rand(6, 1, 1) + 0.5, persistent=False)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.body(self, x).relu().mean((2, 3))).relu())


BODIES: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "a norm": (lambda m, x: m.norm(m.a(x)), True),
    "a norm without weights": (lambda m, x: m.norm(m.a(x)), False),
    "a norm's function": (
        lambda m, x: F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias), True,
    ),
    "a scale and a shift": (lambda m, x: m.a(x) * m.scale + m.shift, True),
    "a shift that is taken away": (lambda m, x: m.a(x) - m.shift, True),
    "a number between": (lambda m, x: m.norm(m.a(x) * 0.5), True),
    "a number behind": (lambda m, x: m.norm(m.a(x)) / 4 + 1, True),
    "a constant behind": (lambda m, x: m.norm(m.a(x)) * m.steady, True),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_refit_folds_is_unfolded(name: str) -> None:
    body, affine = BODIES[name]
    torch.manual_seed(1)
    steady = torch.rand(6, 1, 1) + 0.5

    def make() -> nn.Module:
        model = Body(body, affine)
        model.steady.copy_(steady)
        return model

    models = pair(make, X)
    for model in models:
        model.steady.copy_(steady)
    zipped = merged(models)
    assert max(errors(zipped)) < 1e-12
    assert zipped.report.refitted == 4
    made = list(zipped.as_models().values())
    assert made[0].a.weight is made[1].a.weight
    assert made[0].state_dict().keys() == models[0].state_dict().keys()


def test_a_bias_without_a_place_is_named_and_can_be_left_out() -> None:
    def make() -> nn.Module:
        return Net(chain, conv1=conv(3, 6, bias=False), relu=nn.ReLU(), conv2=conv(6, 6), head=nn.Linear(6, 4))

    models = pair(make, X)
    with pytest.raises(fxzip.RestoreError, match=r"conv1 a bias.*biases=False"):
        merged(models).as_models()
    zipped = merged(models, refit=NO_NEW_BIASES)
    assert zipped.report.refitted == 4
    assert max(errors(zipped)) < 1e-12


def test_norms_get_no_new_weights_without_new_biases() -> None:
    def make() -> nn.Module:
        bare = nn.GroupNorm(2, 6, affine=False)
        return Net(chain, conv1=conv(3, 6), norm=bare, relu=nn.ReLU(), conv2=conv(6, 6), head=nn.Linear(6, 4))

    models = pair(make, X)
    with pytest.raises(fxzip.RestoreError, match="norm a "):
        merged(models).as_models()
    assert max(errors(merged(models, refit=NO_NEW_BIASES))) < 1e-12


def test_tied_weights_are_untied_where_the_class_has_two_names() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.read = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.read.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.read(torch.relu(self.mix(self.words(x))))

    x = torch.arange(40).reshape(8, 5) % 20
    models = [Language().double().eval() for _ in range(2)]
    zipped = merged(models, x, refit=NO_NEW_BIASES)
    made = next(iter(zipped.as_models().values()))
    assert made.read.weight is not made.words.weight
    assert max(errors(zipped, x)) < 1e-12


def test_a_table_that_is_looked_up_is_found_again() -> None:
    x = images(4, 56)
    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 3}
    models = [timm.create_model("swin_tiny_patch4_window7_224", **sizes).double().eval() for _ in range(2)]
    zipped = merged(models, x, refit=NO_NEW_BIASES)
    assert max(errors(zipped, x)) < 1e-9
    made = next(iter(zipped.as_models().values()))
    assert made.forward_features(x).shape == models[0].forward_features(x).shape


def test_only_moved_tensors_are_moved_back() -> None:
    value = torch.randn(2, 3)
    shapes = {"a": torch.Size([3]), "b": torch.Size([3])}
    found = moved_back(lambda t: torch.stack([t["b"].flip(0), t["a"]]), shapes, value)
    assert found is not None
    assert torch.equal(found[0]["a"], value[1])
    assert torch.equal(found[0]["b"], value[0].flip(0))
    assert found[1]
    twice = moved_back(lambda t: torch.stack([t["a"], t["a"]]), shapes, value)
    assert twice is not None
    assert not twice[1]
    for wrong in (lambda t: 2 * t["a"], lambda t: t["a"].relu(), lambda t: t["a"] + t["b"], lambda t: -t["a"]):
        assert moved_back(wrong, shapes, value) is None


def test_what_is_computed_from_weights_is_refused_by_name() -> None:
    def make() -> nn.Module:
        return Net(chain, conv1=nn.utils.parametrizations.spectral_norm(conv(3, 6)), head=nn.Linear(6, 4))

    with pytest.raises(fxzip.RestoreError, match=r"task0 \(Net\): .*conv1"):
        merged(pair(make, X)).as_models()


def test_normalised_weights_get_their_gains_again() -> None:
    """Weight normalisation gives any weights."""

    def make() -> nn.Module:
        return Net(chain, conv1=nn.utils.parametrizations.weight_norm(conv(3, 6)), head=nn.Linear(6, 4))

    zipped = merged(pair(make, X))
    assert max(errors(zipped)) < 1e-10
    a, b = zipped.as_models().values()
    name = "conv1.parametrizations.weight.original0"
    assert a.get_parameter(name) is b.get_parameter(name)


def test_standardised_weights_go_back_where_their_mean_is_0() -> None:
    """A mean of filters with a mean of 0 has one, too; what refit solves for has another."""
    models: list[nn.Module] = [timm.create_model("test_nfnet", num_classes=n).double().eval() for n in (3, 4)]
    x = images(8, 32)
    options: dict[str, Any] = {"method": "permute", "hold_back": False, "verify": False, "progress": False}
    zipped = fxzip.zip(*models, [x], refit=False, **options)
    assert max(errors(zipped, x)) < 1e-6
    with pytest.raises(fxzip.RestoreError, match=r"NormFreeNet.*not put back into its class"):
        fxzip.zip(*models, [x], refit=QUICK, **options).as_models()


# ---- cuts that no class can hold


def test_channels_that_lie_elsewhere_behind_the_cut_are_refused(models: list[nn.Module]) -> None:
    zipped = merged(models, cut="layer2.gate", method="permute")
    with pytest.raises(fxzip.RestoreError, match=r"task1.*begins with unmerge_.*cut in front of"):
        zipped.as_models()


def test_stems_are_refused(models: list[nn.Module]) -> None:
    with pytest.raises(fxzip.RestoreError, match=r"start=.*merge from the input"):
        merged(models, start="layer2").as_models()


# ---- where the classes come from


def test_a_loaded_merge_takes_modules_of_the_classes(models: list[nn.Module], tmp_path: Path) -> None:
    zipped = merged(models)
    loaded = fxzip.load(zipped.save(tmp_path / "merged"))
    with pytest.raises(fxzip.RestoreError, match=r"as_models\(\[model_a, model_b\]\)"):
        loaded.as_models()
    with pytest.raises(fxzip.OptionError, match="a module for each task"):
        loaded.as_models([Residual()])
    fresh = [Residual().double().eval() for _ in range(2)]
    for given in (fresh, dict(zip(zipped.names, fresh, strict=True))):
        made = loaded.as_models(given)
        assert max(difference(call(loaded, X)[i], call(m, X)) for i, m in enumerate(made.values())) < 1e-12
    with pytest.raises(fxzip.FxzipError):
        loaded.as_models([Residual(width=12).double().eval() for _ in range(2)])


def test_the_parents_are_not_kept_alive() -> None:
    parents = pair(Residual, X)
    zipped = merged(parents)
    watched = [weakref.ref(p) for model in parents for p in model.parameters()]
    del parents
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []
    assert zipped.originals is not None
    assert all(p.is_meta for model in zipped.originals.skeletons for p in model.parameters())
    assert max(errors(zipped)) < 1e-12


def test_copies_know_the_classes_and_pickles_do_not(models: list[nn.Module]) -> None:
    zipped = merged(models)
    assert max(errors(copy.deepcopy(zipped))) < 1e-12
    assert pickle.loads(pickle.dumps(zipped.originals)) is None


def test_merged_weights_that_were_trained_since(models: list[nn.Module]) -> None:
    zipped = merged(models)
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter.mul_(1.01)
    assert max(errors(zipped)) < 1e-12


def test_a_difference_is_an_error(models: list[nn.Module]) -> None:
    zipped = merged(models)
    assert zipped.originals is not None
    # A hook that the graph has not: the class computes something else than what was merged.
    skeleton = copy.deepcopy(zipped.originals.skeletons[1])
    skeleton.fc.register_forward_hook(lambda m, args, out: out * 1.001)
    zipped.originals = dataclasses.replace(zipped.originals, skeletons=(skeleton, skeleton))
    with pytest.raises(fxzip.RestoreError, match=r"Residual of task0 would be off by 1.0e-03"):
        zipped.as_models()


# ---- checkpoints


def test_a_checkpoint_for_each_task(models: list[nn.Module], tmp_path: Path) -> None:
    zipped = merged(models, names=("dogs", "birds"))
    folder = zipped.save(tmp_path / "out", layout="models")
    assert sorted(p.name for p in folder.iterdir()) == ["birds.safetensors", "dogs.safetensors"]
    for i, task in enumerate(zipped.names):
        fresh = Residual().double().eval()
        fresh.load_state_dict(load_file(folder / f"{task}.safetensors"))
        assert difference(call(zipped, X)[i], call(fresh, X)) < 1e-12
    with pytest.raises(fxzip.SaveError, match="overwrite=True"):
        zipped.save(folder, layout="models")
    zipped.save(folder, layout="models", overwrite=True)
    with pytest.raises(fxzip.OptionError, match="'fxzip', 'models' or 'deltas'"):
        zipped.save(folder, layout="onnx")  # type: ignore[arg-type]


def test_checkpoints_that_hold_the_trunk_once(models: list[nn.Module], tmp_path: Path) -> None:
    zipped = merged(models, names=("dogs", "birds"))
    folder = zipped.save(tmp_path / "out", layout="deltas")
    shared = load_file(folder / "shared.safetensors")
    for i, task in enumerate(zipped.names):
        own = load_file(folder / f"{task}.safetensors")
        assert not shared.keys() & own.keys()
        fresh = Residual().double().eval()
        fresh.load_state_dict({**shared, **own})
        assert difference(call(zipped, X)[i], call(fresh, X)) < 1e-12
    whole = zipped.save(tmp_path / "whole", layout="models")
    sizes = [sum(path.stat().st_size for path in where.iterdir()) for where in (folder, whole)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.filterwarnings("ignore::fxzip.FewImagesWarning")
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_known_architectures(name: str) -> None:
    x = torch.randn(4, 3, 32, 32)

    size = {"img_size": 32} if name == "test_vit" else {}
    models = [timm.create_model(name, num_classes=3, **size).eval() for _ in range(2)]
    zipped = merged(models, x)
    assert max(errors(zipped, x)) < 1e-5
    made = next(iter(zipped.as_models().values()))
    assert made.state_dict().keys() == models[0].state_dict().keys()
