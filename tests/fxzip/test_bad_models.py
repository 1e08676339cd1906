"""Models that are hard to take: each merges right, or is refused in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import AlignmentError, CalibrationError, TraceError
from tests.nets import Net, Residual, chain, conv, pair, untouched
from tests.oracles import TOLERANCE, call, difference, images, permutation_error, randomise, self_zip_errors

X = images(8, 8)


def small(classes: int = 3) -> nn.Module:
    return Net(
        chain, a=conv(3, 8), norm=nn.BatchNorm2d(8), act=nn.ReLU(), b=conv(8, 6), act2=nn.ReLU(),
        head=nn.Linear(6, classes),
    )  # fmt: skip


class Body(nn.Module):
    """A function of the features between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.function(F.relu(self.a(x))))).mean((2, 3)))


# ---- control flow that depends on data


def halved(x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


UNTRACEABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "branch": lambda x: -x if x.mean() > 0 else x,
    "loop": halved,
    "item": lambda x: x * float(x.max()),
    "numpy": lambda x: x * torch.from_numpy(x.numpy().copy()),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_hangs_on_values_is_refused_and_the_line_named(name: str) -> None:
    models = pair(lambda: Body(UNTRACEABLE[name]), X)
    match = r"Body could not be traced: .*test_bad_models\.py:\d+, in .*depends on the values of a tensor.*torch\.where"
    with untouched(*models), pytest.raises(TraceError, match=match):
        fxzip.zip(*models, [X], progress=False)


def test_as_many_values_as_there_happen_to_be() -> None:
    """The size of ``x[x > 0]`` depends on values, but nothing else does."""
    model = randomise(Body(lambda x: x / x[x > 0].mean()), X)
    with pytest.warns(fxzip.FrozenSpaceWarning, match="getitem"):
        spec = fxzip.analyse(model, X)
    assert [space.name for space in spec.spaces] == ["b"]
    assert permutation_error(model, X, spec) < TOLERANCE


@pytest.mark.parametrize("place", [0, 5])
def test_a_number_that_is_read_keeps_its_channel_in_place(place: int) -> None:
    model = randomise(Body(lambda x: x * x.mean((0, 2, 3)).tolist()[place]), X)
    spec = fxzip.analyse(model, X)
    assert [(space.name, space.size) for space in spec.spaces] == [("a", 7), ("b", 6)]
    assert [(frozen.name, frozen.size) for frozen in spec.frozen] == [("a", 1)]
    assert permutation_error(model, X, spec) < TOLERANCE


def test_a_choice_by_constants_is_no_choice_by_data() -> None:
    def masked(x: Tensor) -> Tensor:
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        mask[0, 1] = True
        return x * mask if mask.sum() == 37 and bool(torch.arange(3).any()) else x[:, :, :1]

    model = randomise(Body(masked), X)
    assert max(self_zip_errors_of(model, X).values()) < TOLERANCE


def test_a_choice_by_a_constant_that_was_overwritten_with_data_is_refused() -> None:
    def deceiving(x: Tensor) -> Tensor:
        mask = torch.zeros(8, dtype=x.dtype)
        mask[0] = x.mean()
        return x if mask.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"in deceiving \(return x if mask"):
        fxzip.analyse(randomise(Body(deceiving), X), X)


def self_zip_errors_of(model: nn.Module, x: Any) -> dict[str, float]:
    with untouched(model):
        return self_zip_errors(model, x, step=3)


# ---- inputs and outputs


@dataclass
class Answer:
    logits: Tensor
    features: list[Tensor]


class Two(nn.Module):
    """An image and a table beside it; the output is whatever is asked for."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, table: Tensor, flip: bool = False) -> Any:
        x = F.relu(self.a(image.flip(3) if flip else image))
        x = F.relu(self.b(x).mean((2, 3)) + self.c(table))
        logits = self.head(x)
        outputs = {"tensor": logits, "dict": {"logits": logits, "more": {"input": table}}, "list": [logits, table]}
        return {**outputs, "tuple": (logits, None), "dataclass": Answer(logits, [table])}[self.kind]


TABLE = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", ["tuple", "dict", "tuple and a flag"])
def test_several_inputs(example: str) -> None:
    keywords = {"image": X, "table": TABLE}
    given: Any = {"tuple": (X, TABLE), "dict": keywords, "tuple and a flag": (X, TABLE, True)}[example]
    batch = {**keywords, "flip": True} if len(given) == 3 else keywords
    a, b = (randomise(Two(), keywords, seed) for seed in range(2))
    with untouched(a, b):
        prepared = fxzip.prepare(a, b, example_inputs=given).observe([batch], progress=False)
        zipped = prepared.convert(cut=0.0, progress=False)
        assert difference((call(a, batch), call(b, batch)), call(zipped, batch)) == 0
        full = prepared.convert(progress=False)
    assert full(**batch)[0].shape == (8, 3)
    assert max(self_zip_errors_of(a, keywords).values()) < TOLERANCE


def test_an_input_that_is_missing_is_named() -> None:
    a, b = (randomise(Two(), (X, TABLE), seed) for seed in range(2))
    with pytest.raises(TraceError, match="table"):
        fxzip.zip(a, b, [X], progress=False)
    with pytest.raises(TraceError, match="tabel"):
        fxzip.zip(a, b, [{"image": X, "tabel": TABLE}], progress=False)


@pytest.mark.parametrize("kind", ["dict", "list", "tuple", "dataclass"])
def test_outputs_of_every_kind(kind: str) -> None:
    inputs = {"image": X, "table": TABLE}
    a, b = (randomise(Two(kind), inputs, seed) for seed in range(2))
    zipped = fxzip.zip(a, b, [inputs], cut=0.0, progress=False)
    first, second = call(zipped, inputs)
    assert type(first) is {"dict": dict, "list": list, "tuple": tuple, "dataclass": dict}[kind]
    for model, got in ((a, first), (b, second)):
        expected = call(model, inputs)
        expected = vars(expected) if kind == "dataclass" else expected
        assert difference(expected, got) == 0
    assert kind != "tuple" or first[1] is None
    if kind != "dataclass":  # which the oracles cannot look into
        assert max(self_zip_errors_of(a, inputs).values()) < TOLERANCE


# ---- modules and parameters that are used again


class Again(nn.Module):
    """One convolution on two spaces that must thereby be one, one norm for two places, one activation for all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.head = conv(3, 8), conv(3, 8), conv(8, 8), nn.Linear(8, 3)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.act(self.norm(self.a(x))), self.act(self.norm(self.b(x)))
        x = self.act(self.mix(left)) * self.act(self.mix(right))
        return self.head(self.mix(x).mean((2, 3)))


def test_modules_that_are_used_twice() -> None:
    model = randomise(Again(), X)
    spec = fxzip.analyse(model, X)
    assert [(space.name, space.size) for space in spec.spaces] == [("a", 8)]
    assert max(self_zip_errors_of(model, X).values()) < TOLERANCE
    a, b = pair(Again, X)
    for refit in (False, True):
        outputs = call(fxzip.zip(a, b, [X], cut=0.0, refit=refit, progress=False), X)
        assert difference((call(a, X), call(b, X)), outputs) == 0
        assert call(fxzip.zip(a, b, [X], refit=refit, progress=False), X)[0].isfinite().all()


class TiedTwice(nn.Module):
    """Two layers with one weight, in a trunk that is refitted."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 3)
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


def test_refitting_leaves_tied_layers_alone() -> None:
    """Solving one of two layers that share a weight would change the other behind its back."""
    a, b = pair(TiedTwice, X)
    prepared = fxzip.prepare(a, b, example_inputs=X).observe([X], progress=False)
    plain, refitted = (prepared.convert(refit=refit, method="average", progress=False) for refit in (False, True))
    assert refitted.trunk.b.weight is refitted.trunk.c.weight
    assert torch.equal(refitted.trunk.b.weight, plain.trunk.b.weight)
    assert not torch.equal(refitted.trunk.a.weight, plain.trunk.a.weight)


# ---- buffers


class Positions(nn.Module):
    """Keeps a table of positions for the size that it saw last."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6, 3)
        if registered:
            self.register_buffer("table", torch.empty(0), persistent=False)
        else:
            self.table = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
        return self.head(F.relu(self.b(x * self.table)).mean((2, 3)))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_buffers_that_depend_on_the_size_of_the_input(registered: bool, ran: bool) -> None:
    model = Positions(registered).double().eval()
    if ran:
        call(model, images(2, 12))
        call(model, X)
    before = model.table
    with untouched(model):
        spec = fxzip.analyse(model, X)
    assert model.table is before
    assert [space.name for space in spec.spaces] == ["a", "b"]
    assert max(self_zip_errors(model, X, step=3).values()) < TOLERANCE


# ---- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refit", [False, True])
def test_half_precision(dtype: torch.dtype, refit: bool) -> None:
    narrow = [model.to(dtype) for model in pair(small, X)]
    wide = pair(small, X)
    for model, source in zip(wide, narrow, strict=True):
        model.load_state_dict(source.state_dict())
    x = X.to(dtype)
    method = "zip" if refit else "average"  # matches may differ where correlations differ in the third digit
    merged = fxzip.zip(*narrow, [x], refit=refit, method=method, progress=False)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    expected = call(fxzip.zip(*wide, [x.double()], refit=refit, method=method, progress=False), x.double())
    assert {out.dtype for out in call(merged, x)} == {dtype}
    assert difference(expected, call(merged, x)) < (0.05 if dtype == torch.float16 else 0.4)


def test_the_meta_device_can_be_analysed_but_not_merged() -> None:
    with torch.device("meta"):
        a, b = small(), small()
    spec = fxzip.analyse(a, X.float())
    assert [space.size for space in spec.spaces] == [8, 6]
    prepared = fxzip.prepare(a, b, example_inputs=X.float())
    assert "b" in prepared.cuts
    with pytest.raises(CalibrationError, match=r"model 0 is on the meta device.*to_empty.*load_state_dict"):
        fxzip.zip(a, b, [X.float()], progress=False)
    with pytest.raises(AlignmentError, match="model 1 is on meta, model 0 is on cpu"):
        fxzip.zip(small(), b, [X.float()], progress=False)


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(small().eval(), {nn.Linear}, dtype=torch.qint8)


def test_parameters_without_values_beside_buffers_that_have_them() -> None:
    real, model = Residual(), Residual()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.to("meta")))
    x = torch.randn(2, 3, 8, 8)
    found, expected = fxzip.analyse(model, x), fxzip.analyse(real, x)
    assert [repr(space) for space in found.spaces] == [repr(space) for space in expected.spaces]
    assert found.coverage == expected.coverage
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_models_are_refused() -> None:
    match = "Net, at 'head': Linear is quantised.*before, then quantise the result"
    with pytest.raises(TraceError, match=match):
        fxzip.zip(quantised(), quantised(), [X.float()], progress=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    script = torch.jit.script(nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)))
    with pytest.raises(TraceError, match=r"TorchScript module cannot be looked into; give the nn\.Module"):
        fxzip.analyse(script, X.float())


# ---- wrappers


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name: str) -> None:
    models = pair(small, X)
    expected = fxzip.zip(*models, [X], progress=False)
    wrapped = [WRAPPERS[name](model) for model in models]
    with untouched(*models):
        merged = fxzip.zip(*wrapped, [X], progress=False)
        assert difference(call(models[0], X), call(fxzip.analyse(wrapped[0], X).permute(wrapped[0]), X)) < TOLERANCE
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert difference(call(expected, X), call(merged, X)) == 0


def test_a_model_compiled_in_place() -> None:
    models = pair(small, X)
    expected = fxzip.zip(*models, [X], progress=False)
    for model in models:
        model.compile()
    assert difference(call(expected, X), call(fxzip.zip(*models, [X], progress=False), X)) == 0
