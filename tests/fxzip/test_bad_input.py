"""What a user may do wrong: which error is raised, what it names, and that the models stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import AlignmentError, CalibrationError, CutError, OptionError, TraceError
from tests.nets import Net, Residual, chain, conv, pair, permuted_copy, untouched
from tests.oracles import TOLERANCE, call, difference, images, randomise, self_zip_errors

X = images(8, 8)


@contextmanager
def refused(error: type[Exception], match: str, *models: nn.Module) -> Iterator[None]:
    """The error is raised, its message matches, and the models are as they were."""
    hooks = [model.register_forward_hook(lambda *_: None) for model in models]
    with untouched(*models), pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, fxzip.FxzipError)
    for hook in hooks:
        hook.remove()


def small(classes: int = 3) -> nn.Module:
    return Net(
        chain, a=conv(3, 8), norm=nn.BatchNorm2d(8), act=nn.ReLU(), b=conv(8, 6), act2=nn.ReLU(),
        head=nn.Linear(6, classes),
    )  # fmt: skip


@pytest.fixture
def nets() -> list[nn.Module]:
    """Two networks in train mode, but for one part."""
    a, b = pair(small, X)
    a.train()
    b.train()
    b.norm.eval()
    return [a, b]


def zipped(*models: nn.Module, loader: Any = None, **options: Any) -> fxzip.ZippedModel:
    return fxzip.zip(*models, loader=[X] if loader is None else loader, progress=False, **options)


# ---- models


def test_models_that_differ_from_the_first_layer(nets: list[nn.Module]) -> None:
    other = randomise(Net(chain, a=conv(3, 7), b=conv(7, 6), head=nn.Linear(6, 3)), X)
    match = r"share no layer: model 0 and model 1 diverge at a \(Conv2d, weight 8 x 3.*7 x 3.*out_channels is 8"
    with refused(AlignmentError, match, nets[0], other):
        zipped(nets[0], other)


def test_models_that_share_no_layer_but_a_norm() -> None:
    models = [
        randomise(Net(chain, norm=nn.BatchNorm2d(3), a=conv(3, 8, size), head=nn.Linear(8, 3)), X) for size in (3, 1)
    ]
    with refused(CutError, r"no layer comes before.*diverge at a \(Conv2d, weight 8 x 3", *models):
        zipped(*models)


def test_models_that_are_nothing_but_classifiers() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double() for _ in range(2)]
    with refused(CutError, "the classifiers begin at", *models):
        zipped(*models)


class Ordered(nn.Module):
    """The order of its first channels matters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.a(x).cumsum(1))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::fxzip.FrozenSpaceWarning")
def test_no_shared_space_before_the_cut() -> None:
    models = pair(Ordered, X)
    with refused(CutError, "cut='b': the layers before it share no channel space.*a: cumsum", *models):
        zipped(*models, cut="b")
    with refused(CutError, "cut='cumsum': the trunk cannot end there.*valid nearby: .*b", *models):
        zipped(*models, cut="cumsum")


def test_one_model_only(nets: list[nn.Module]) -> None:
    with refused(OptionError, "1 model given", nets[0]):
        fxzip.zip(nets[0], [X])
    with refused(OptionError, "1 model given", nets[0]):
        fxzip.prepare(nets[0], example_inputs=X)
    with pytest.raises(OptionError, match="0 model"):
        fxzip.zip([X])


def test_no_loader(nets: list[nn.Module]) -> None:
    with refused(OptionError, r"no loader: call fxzip\.zip\(model_a, model_b, loader\)", *nets):
        fxzip.zip(*nets)
    with pytest.raises(OptionError, match="no loader"):
        fxzip.zip()


def test_something_that_is_no_model(nets: list[nn.Module]) -> None:
    with refused(OptionError, "model 1 is a str", nets[0]):
        fxzip.zip(nets[0], "resnet18", [X])


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.mean() > 0:  # the line to be named
            x = -x
        return self.head(x.mean((2, 3)))


def test_untraceable_control_flow_names_the_line() -> None:
    models = pair(Deciding, X)
    match = r"Deciding could not be traced.*test_bad_input\.py:\d+, in forward \(if x\.mean\(\) > 0:"
    with refused(TraceError, match, *models):
        zipped(*models)
    with refused(TraceError, match, models[0]):
        fxzip.analyse(models[0], X)


def test_a_model_on_another_device_than_its_peer(nets: list[nn.Module]) -> None:
    far = copy.deepcopy(nets[1]).to("meta")
    with refused(AlignmentError, "model 1 is on meta, model 0 is on cpu", nets[0], far):
        zipped(nets[0], far)
    far = copy.deepcopy(nets[1])
    far.head.to("meta")
    with refused(AlignmentError, "model 1 is spread over several devices, move it to one: cpu, meta", nets[0], far):
        zipped(nets[0], far)


def test_train_mode_is_kept_and_the_result_is_that_of_eval_mode(nets: list[nn.Module]) -> None:
    with untouched(*nets):
        found = zipped(*nets)
        permuted = permuted_copy(nets[0], X)
    expected = zipped(*(copy.deepcopy(net).eval() for net in nets))
    assert nets[0].training
    assert not any(module.training for module in found.modules())
    assert difference(call(expected, X), call(found, X)) == 0
    assert permuted.training


# ---- shared weights


class Tied(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x + F.relu(self.b(x))
        x = x + F.relu(self.b(x))
        return self.head(x.mean((2, 3)))


class TiedWeights(nn.Module):
    """Two layers that have one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 3)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [Tied, TiedWeights])
def test_shared_weights_within_a_model(make: type[nn.Module]) -> None:
    model = randomise(make(), X)
    with untouched(model):
        errors = self_zip_errors(model, X)
    assert max(errors.values()) < TOLERANCE, errors
    a, b = pair(make, X)
    with untouched(a, b):
        merged = zipped(a, b)
    ties = [merged.trunk.get_submodule(name).weight for name in ("b", "c") if hasattr(a, name)]
    assert all(weight is ties[0] for weight in ties)


def test_one_module_given_twice(nets: list[nn.Module]) -> None:
    a = nets[0]
    with untouched(a):
        prepared = fxzip.prepare(a, a, example_inputs=X).observe([X], progress=False)
        for method in ("zip", "permute", "average"):
            merged = prepared.convert(method=method, refit=False, reset_batch_norm=False, progress=False)
            assert max(difference(call(a.eval(), X), out) for out in call(merged, X)) < TOLERANCE
            a.train()
    assert merged.heads["task0"].head is not merged.heads["task1"].head


# ---- the cut


def test_an_unknown_cut_names_the_nearest(nets: list[nn.Module]) -> None:
    models = pair(Residual, X)
    with refused(
        CutError, r"cut='layer_2': no shared module or node of that name; valid nearby: .*\blayer2\b", *models
    ):
        zipped(*models, cut="layer_2")
    with refused(CutError, "cut='zzzz': no shared module.*valid nearby: stem, norm", *models):
        zipped(*models, cut="zzzz")


def test_a_cut_where_bundles_cross_or_beyond_the_classifier(nets: list[nn.Module]) -> None:
    def halves(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return m.out(F.relu(m.head(F.relu(left * right).mean((2, 3)))))

    models = pair(lambda: Net(halves, a=conv(3, 8), head=nn.Linear(4, 6), out=nn.Linear(6, 3)), X)
    with refused(CutError, "cut='getitem': the trunk cannot end there.*bundled.*valid nearby: .*chunk", *models):
        zipped(*models, cut="getitem")
    tail = pair(
        lambda: Net(lambda m, x: m.act(m.head(m.a(x).mean((2, 3)))), a=conv(3, 8), head=nn.Linear(8, 3), act=nn.ReLU()),
        X,
    )
    with refused(CutError, "cut='act'.*classifiers begin at head; valid nearby: .*head", *tail):
        zipped(*tail, cut="act")


@pytest.mark.parametrize("cut", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range(nets: list[nn.Module], cut: float) -> None:
    with refused(CutError, r"cut=.*between 0 and 1", *nets):
        zipped(*nets, cut=cut)


@pytest.mark.parametrize("cut", [True, ["a"], nn.ReLU()])
def test_a_cut_that_is_neither_name_nor_share(nets: list[nn.Module], cut: Any) -> None:
    with refused(CutError, r"cut=.*name of a module or node, a share", *nets):
        zipped(*nets, cut=cut)


# ---- the loader


@pytest.mark.parametrize("loader", [[], (), torch.utils.data.DataLoader([])])
def test_an_empty_loader(nets: list[nn.Module], loader: Any) -> None:
    with refused(CalibrationError, "empty", *nets):
        zipped(*nets, loader=loader)
    prepared = fxzip.prepare(*nets, example_inputs=X)
    with refused(CalibrationError, "gave no batches", *nets):
        prepared.observe(loader, progress=False)


def test_a_one_shot_generator(nets: list[nn.Module]) -> None:
    with refused(CalibrationError, "read only once.*DataLoader or a list", *nets):
        zipped(*nets, loader=(x for x in [X]))
    prepared = fxzip.prepare(*nets, example_inputs=X)
    prepared.observe((x for x in [X]), progress=False)  # enough where the loader is not read again
    prepared.convert(refit=False, reset_batch_norm=False, progress=False)
    with refused(CalibrationError, "gave no batches.*generator", *nets):
        prepared.convert(progress=False)


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (7, "loader is a int"),
        ([7], "gave an int; a batch must be a tensor"),
        (["x"], "gave a str"),
        ([()], "empty tuple"),
        ([(None, X)], "first element is None"),
        ([{}], "empty dict"),
        ([{"x": 1}], "without a tensor"),
        ([X, "x"], "batch 1: the loader gave a str"),
    ],
)
def test_a_loader_of_the_wrong_type(nets: list[nn.Module], loader: Any, match: str) -> None:
    with refused(CalibrationError, match, *nets):
        zipped(*nets, loader=loader)


def test_a_first_batch_of_the_wrong_shape_or_dtype(nets: list[nn.Module]) -> None:
    for wrong, shown in (
        (X[:, :1], r"float64\[8, 1, 8, 8\]"),
        (X.long(), r"int64\[8"),
    ):
        with refused(TraceError, rf"Net itself fails on the example input \({shown}", *nets):
            zipped(*nets, loader=[wrong])
    with refused(TraceError, r"itself fails on the example input \(image=float64\[8, 3, 8, 8\]\).*image", *nets):
        zipped(*nets, loader=[{"image": X}])


def test_a_later_batch_of_the_wrong_shape(nets: list[nn.Module]) -> None:
    with refused(CalibrationError, r"batch 1.*float64\[8, 1, 8, 8\] does not fit.*\['batch', 3, 8, 8\]", *nets):
        zipped(*nets, loader=[X, X[:, :1]])
    with refused(CalibrationError, r"batch 1: the loader gave a single sample.*float64\[3, 8, 8\]", *nets):
        zipped(*nets, loader=[X, X[0]])
    with refused(CalibrationError, r"batch 1.*int64\[8, 3, 8, 8\]", *nets):
        zipped(*nets, loader=[X, X.long()])


def test_a_loader_that_fails_itself(nets: list[nn.Module]) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Tensor]:
            yield X
            raise KeyError("a broken dataset")

    with untouched(*nets), pytest.raises(KeyError, match="broken"):
        zipped(*nets, loader=Broken())


def test_nothing_was_observed(nets: list[nn.Module]) -> None:
    with refused(CalibrationError, r"nothing was observed yet: call prepared\.observe\(loader\) first", *nets):
        fxzip.prepare(*nets, example_inputs=X).convert()
    with refused(CalibrationError, "nothing was observed yet", *nets):
        fxzip.prepare(*nets, example_inputs=X).plan()


# ---- the activations


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "first batch", "later batch"])
def test_activations_that_are_not_finite_name_the_node(nets: list[nn.Module], value: float, where: str) -> None:
    bad = X.clone()
    bad[3, 1, 2, 2] = value
    if where == "weight":
        nets[1].b.bias.data[2] = abs(value)
    loader = {"weight": [X], "first batch": [bad, X], "later batch": [X, bad]}[where]
    node = "act2" if where == "weight" else "act"
    with refused(CalibrationError, rf"batch {int(where == 'later batch')}:.*node '{node}'.*finite", *nets):
        zipped(*nets, loader=loader)


def test_a_head_that_is_not_finite_is_the_users_own(nets: list[nn.Module]) -> None:
    nets[1].head.bias.data[0] = float("nan")
    with untouched(*nets):
        first, second = call(zipped(*nets), X)
    assert first.isfinite().all()
    assert second[:, 0].isnan().all()
    assert second[:, 1:].isfinite().all()


@pytest.mark.parametrize("method", ["zip", "permute", "average", "optimal"])
def test_dead_channels_match_last(nets: list[nn.Module], method: str) -> None:
    a, b = nets
    with torch.no_grad():
        a.b.weight[[1, 4]] = 0
        b.b.weight[[0, 2, 3]] = 0
    prepared = fxzip.prepare(a, b, example_inputs=X)
    with untouched(a, b):
        prepared.observe([X], progress=False)
        merged = prepared.convert(method=method, progress=False)
    dead = prepared.moments["b"].dead
    assert dead.nonzero().flatten().tolist() == [1, 4, 6, 8, 9]
    assert not prepared.moments["b"].correlation.isnan().any()
    assert all(out.isfinite().all() for out in call(merged, X))
    assert all(row.correlation == row.correlation for row in merged.report.spaces)
    if method == "permute":  # living channels pair with living ones as long as there are any
        prepared = fxzip.prepare(a.eval(), permuted_copy(a, X), example_inputs=X).observe([X], progress=False)
        again = prepared.convert(method=method, refit=False, reset_batch_norm=False, progress=False)
        assert max(difference(call(a, X), out) for out in call(again, X)) < TOLERANCE


# ---- options


class Unread:
    """A loader that nobody may read."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the loader was read before the options were checked")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "zip", "alpha": -0.1}, r"alpha=-0\.1: it must be a number from 0 to 1"),
        ({"method": "zip", "beta": float("nan")}, "beta=nan: it must be a number from 0 to 1"),
        ({"method": "zip", "alpha": "0.5"}, r"alpha='0\.5': it must be a number from 0 to 1"),
        ({"method": "zip", "alpha": True}, "alpha=True: it must be a number from 0 to 1"),
        ({"method": "zip", "beta": np.float32(1.5)}, r"beta=np\.float32\(1\.5\): it must be a number from 0 to 1"),
        ({"method": "zip", "beta": None}, "beta=None: it must be a number from 0 to 1"),
        ({"method": "dual", "gamma": 2}, "gamma=2: it must be a number from 0 to 1"),
        ({"refit": "no"}, r"refit='no': give True, False, or fxzip\.RefitOptions"),
        ({"refit": 1}, "refit=1: give True, False"),
        ({"progress": "no"}, "progress='no': give True or False"),
        ({"points": ["last"]}, r"points=\['last'\] is unknown; use 'last' or 'all'"),
        ({"ridge": 0.1}, r"'ridge' is a setting of refit: give refit=fxzip\.RefitOptions\(ridge=0\.1\)"),
        (
            {"device": "cuda"},
            "'device'; it is neither an argument of zip.* nor an option of method 'auto', which takes none",
        ),
        ({"alpha": 0.5}, "'alpha' is an option of method 'zip': give method='zip' with it"),
        ({"alhpa": 0.5}, r"unknown argument 'alhpa'.*; did you mean alpha"),
        ({"reset_batch_norm": False}, r"unknown argument 'reset_batch_norm'; it is neither an argument of zip\(\)"),
        ({"method": ["zip"]}, r"unknown matching method \['zip'\]"),
        ({"names": ["a"]}, "one name for each of the 2 models"),
    ],
)
def test_options_are_checked_before_anything_is_read(nets: list[nn.Module], given: dict[str, Any], says: str) -> None:
    with refused(OptionError, says, *nets):
        fxzip.zip(*nets, Unread(), **{"progress": False, **given})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cut": "flops<=1.2.3x"}, "write a budget as"),
        ({"cut": 1.5}, "between 0 and 1"),
        ({"start": True}, "start=True: give the name"),
        ({"start": "flops<=1.2x"}, "give the name of a module or node, or a share"),
    ],
)
def test_places_that_no_network_has(nets: list[nn.Module], given: dict[str, Any], says: str) -> None:
    with refused(CutError, says, *nets):
        fxzip.zip(*nets, Unread(), progress=False, **given)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", float("nan"), float("inf"), None, np.float64(0.5)])
@pytest.mark.parametrize(
    "name",
    [field.name for field in fields(fxzip.RefitOptions) if "setting" in field.metadata and field.name != "ridge"],
)
def test_settings_of_refit_that_cannot_be(name: str, value: Any) -> None:
    with refused(OptionError, f"{name}=.*: it must be a whole number, [01] or more"):
        fxzip.RefitOptions(**{name: value})


@pytest.mark.parametrize("value", [0, 1, None, "no"])
def test_whether_to_add_biases_is_a_flag(value: Any) -> None:
    with refused(OptionError, "biases=.*: it must be True or False"):
        fxzip.RefitOptions(biases=value)
    with refused(OptionError, "keep_norms=.*: it must be True or False"):
        fxzip.RefitOptions(keep_norms=value)


def test_settings_of_refit_are_numbers_of_pythons_own() -> None:
    given = fxzip.RefitOptions(ridge=np.float32(0.5), rounds=np.int64(3), images=100.0)
    assert given == fxzip.RefitOptions(ridge=0.5, rounds=3, images=100)
    assert (type(given.ridge), type(given.rounds), type(given.images)) == (float, int, int)
    with refused(OptionError, "ridge=-1: it must be a number, 0 or more"):
        fxzip.RefitOptions(ridge=-1)


def test_a_sweep_checks_all_its_merges_before_the_first(nets: list[nn.Module]) -> None:
    prepared = fxzip.prepare(*nets, example_inputs=X).observe([X], progress=False)
    for methods, says in (
        (["average", {"method": "zip", "alpha": 2}], "alpha=2"),
        (["average", {"refit": "no"}], "refit='no'"),
        ([{"cut": "b"}], "give sweep its cuts apart"),
        ([{"points": "all"}], r"'points'; it is neither an argument of convert\(\)"),
    ):
        with refused(OptionError, says, *nets):
            prepared.sweep([None], methods, lambda _: pytest.fail("it was merged"), progress=False)
    with refused(CutError, "cut='nowhere'", *nets):
        prepared.sweep([None, "nowhere"], ["average"], lambda _: pytest.fail("it was merged"), progress=False)


def test_an_option_that_the_method_does_not_take(nets: list[nn.Module]) -> None:
    with refused(OptionError, "'alpha'; it is neither .* nor an option of method 'permute', which takes none", *nets):
        zipped(*nets, method="permute", alpha=0.5)
    with refused(OptionError, "unknown matching method 'zap'; did you mean 'zip'", *nets):
        zipped(*nets, method="zap")


def test_a_method_that_takes_no_third_model_says_so_before_any_work(nets: list[nn.Module]) -> None:
    with refused(OptionError, "two models", *nets):
        fxzip.zip(*nets, nets[0], loader=iter(()), method="optimal")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("dogs", "dogs"), "dogs.*one name for each of the 2 models, all different"),
        (("dogs",), "one name for each of the 2 models"),
        ("ab", "one name for each of the 2 models"),
        (("dogs", "my.birds"), "'my.birds' cannot be the name of a task"),
        (("dogs", "keys"), "'keys' cannot"),
        (("dogs", "training"), "'training' cannot"),
        (("dogs", ""), "'' cannot"),
        ((1, 2), "1 cannot"),
    ],
)
def test_names_of_tasks(nets: list[nn.Module], names: Any, match: str) -> None:
    with refused(OptionError, match, *nets):
        zipped(*nets, names=names)
