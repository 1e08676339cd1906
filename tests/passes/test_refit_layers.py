"""Refit for every kind of layer that is linear in its weights: the same products, exact merges, least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd
from torch.nn import functional as F

import fxzip
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.refit.layers import Layer
from fxzip.passes.refit.units import find_units
from fxzip.passes.trace import trace
from tests.nets import Net, pair, permuted_copy
from tests.oracles import call, difference, randomise, recorded

IN, OUT = 8, 6
SIZES = {0: (5,), 1: (12,), 2: (8, 8), 3: (4, 4, 4)}  # of the inputs by dimensions; tokens for none
STEMS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Written(nn.Module):
    """A layer that is written as a function of its input, a weight and a bias."""

    def __init__(self, shape: tuple[int, ...], function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(OUT))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def conv1d_of_gpt2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers.pytorch_utils.Conv1D has it."""
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])


def two_axes(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    """A projection to three heads of two channels, and back to a row of channels."""
    return torch.einsum("btd,dhk->bthk", x, weight).reshape(*x.shape[:-1], OUT)


def written(shape: tuple[int, ...], function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Written(shape, function)


# name: (what makes the layer, the dimensions of its input)
KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(IN, OUT), 0),
    "linear function": (written((OUT, IN), F.linear), 0),
    "addmm": (written((IN, OUT), conv1d_of_gpt2), 0),
    "matmul": (written((IN, OUT), lambda x, w, _: x @ w), 0),
    "matmul and bias": (written((IN, OUT), lambda x, w, b: b + torch.matmul(x, w)), 0),
    "matmul from the left": (written((OUT, IN), lambda x, w, _: w @ x), 1),
    "einsum": (written((OUT, IN), lambda x, w, b: torch.einsum("btd,od->bto", x, w) + b), 0),
    "einsum to two axes": (written((IN, 3, 2), two_axes), 0),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 3, padding=1), 1),
    "conv1d, dilated": (lambda: nn.Conv1d(IN, OUT, 3, 2, 1, 2, groups=2), 1),
    "conv2d": (lambda: nn.Conv2d(IN, OUT, (3, 2), (1, 2), (1, 0)), 2),
    "conv2d, depthwise": (lambda: nn.Conv2d(IN, IN, 3, padding=2, dilation=2, groups=IN), 2),
    "conv2d, same": (lambda: nn.Conv2d(IN, OUT, 4, padding="same", dilation=(1, 2)), 2),
    "conv2d, reflected": (lambda: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="reflect"), 2),
    "conv2d, circular": (lambda: nn.Conv2d(IN, OUT, 3, padding=(2, 1), padding_mode="circular"), 2),
    "conv2d function": (written((OUT, IN, 2, 2), lambda x, w, b: F.conv2d(x, w, b, padding="valid", stride=2)), 2),
    "conv3d": (lambda: nn.Conv3d(IN, OUT, (1, 2, 2), padding=(0, 1, 0)), 3),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(IN, OUT, 3, 2, 1, 1), 1),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(IN, OUT, 2, 2), 2),
    "conv_transpose2d, all": (lambda: nn.ConvTranspose2d(IN, OUT, 3, (3, 2), (1, 4), (2, 1), groups=2, dilation=2), 2),
    "conv_transpose2d function": (
        written((IN, OUT, 3, 3), lambda x, w, b: F.conv_transpose2d(x, w, b, 2, padding=1, output_padding=1)),
        2,
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(IN, OUT, 2, 2), 3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, classes: int | None = 5) -> Net:
    """A network with the layer in it; without classes the layer is its end."""
    layer, dims = KINDS[kind]
    stem = STEMS[dims](3, IN, 3, padding=1) if dims else nn.Linear(3, IN)
    if classes is None:
        return Net(lambda m, x: m.layer(m.stem(x).relu()), stem=stem, layer=layer())

    def body(m: Net, x: Tensor) -> Tensor:
        x = m.layer(m.stem(x).relu()).tanh()
        return m.head(x.flatten(2).mean(2) if dims else x.mean(1))

    width = IN if "depthwise" in kind else OUT
    return Net(body, stem=stem, layer=layer(), head=nn.Linear(width, classes))


def inputs(kind: str, count: int = 12) -> Tensor:
    dims = KINDS[kind][1]
    shape = (count, *SIZES[0], 3) if not dims else (count, 3, *SIZES[dims])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solved_layer(model: nn.Module, x: Tensor) -> tuple[Any, Layer]:
    """The traced network, and the layer of it that is the kind's."""
    module = canonicalise(trace(model, (x,)))
    layers = [layer for unit in find_units(module) for layer in unit.layers]
    (found,) = (layer for layer in layers if layer.weight == "layer.weight")
    return module, found


@every_kind
def test_the_columns_are_what_the_weights_are_multiplied_by(kind: str) -> None:
    x = inputs(kind, 3)
    module, layer = solved_layer(randomise(make(kind), x), x)
    values = recorded(module, x)
    how = layer.contraction
    weight = module.get_parameter(layer.weight)
    assert torch.equal(how.unpacked(how.packed(weight)), weight)
    with torch.no_grad():
        columns, rows = how.columns(values[layer.source.name]), how.rows(values[layer.end.name])
        without = rows - how.packed(weight) @ columns
    assert torch.allclose(without, without[:, :, :1].expand_as(without))  # the bias, or nothing
    assert columns.shape[2] == how.samples(values[layer.end.name])
    here = torch.randperm(columns.shape[2])[:5]
    assert torch.equal(how.columns(values[layer.source.name], here), columns[:, :, here])
    assert torch.equal(how.rows(values[layer.end.name], here), rows[:, :, here])
    source, end = values[layer.source.name], values[layer.end.name]
    assert torch.allclose(how.products(source, end), rows @ columns.mT)
    assert torch.allclose(how.total_input(source), columns.sum(2))
    assert torch.allclose(how.total_output(end), rows.sum(2))


@every_kind
def test_what_is_exact_stays_exact(kind: str) -> None:
    x = inputs(kind)
    model = randomise(make(kind), x)
    other = permuted_copy(model, x)
    zipped = fxzip.zip(model, other, [x[:5], x[5:]], method="permute", hold_back=False, progress=False)
    assert zipped.report.refitted == 4  # the stem, the layer and two heads
    for expected, out in zip((call(model, x), call(other, x)), call(zipped, x), strict=True):
        assert difference(expected, out) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "depthwise" not in kind])  # it has no cut before it
def test_a_layer_is_the_least_squares_solution(kind: str) -> None:
    """Its design matrix is the derivative of what it gives by its parameters, taken by autograd."""
    x = inputs(kind)
    models = pair(lambda: make(kind, None), x)
    zipped = fxzip.zip(
        *models, [x[:5], x[5:]], refit=fxzip.RefitOptions(ridge=0.0), method="zip", hold_back=False, progress=False
    )
    assert [name for name, _ in zipped.trunk.named_parameters()] == ["stem.weight", "stem.bias"]
    (crossing,) = call(zipped.trunk, x)
    for model, head, out in zip(models, zipped.heads.values(), call(zipped, x), strict=True):
        layer, values = model.layer, recorded(head, crossing)
        source = next((value for name, value in values.items() if name.endswith("_gather")), crossing)
        zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}

        design = jacfwd(lambda p, layer, x: functional_call(layer, p, (x,)).reshape(-1))(zeros, layer, source)
        design = torch.cat([part.flatten(1) for part in design.values()], 1)
        wanted = call(model, x)
        best = design @ torch.linalg.lstsq(design, wanted.reshape(-1, 1)).solution
        least = float((best - wanted.reshape(-1, 1)).square().mean())
        assert least > 1e-4  # there is something to fit
        assert difference(best.reshape(out.shape), out) < 1e-5


@every_kind
def test_one_image_does_not_blow_up(kind: str) -> None:
    x = inputs(kind)
    models = pair(lambda: make(kind), x)
    prepared = fxzip.prepare(*models, example_inputs=x).observe([x[:1]], hold_back=False, progress=False)
    wanted = [call(model, x) for model in models]

    def error(refit: bool) -> float:
        outputs = call(prepared.convert(refit=refit, method="zip", progress=False), x)
        assert all(bool(out.isfinite().all()) for out in outputs)
        return sum(float((a - b).square().mean()) for a, b in zip(wanted, outputs, strict=True))

    assert error(refit=True) < 3 * error(refit=False)
