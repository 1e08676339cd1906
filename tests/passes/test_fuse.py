"""W* = M blockdiag(W_1, ..., W_N) U, against the dense matrices written out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.matching import MergeMap
from fxzip.passes.cut import MergePlan
from fxzip.passes.match import match_spaces
from fxzip.passes.split import split
from fxzip.passes.split.fuse import fuse_parameter
from tests.nets import Net, chain, conv
from tests.oracles import images, randomise

X = images(8, 8)
METHODS = {"zip": {"alpha": 0.9, "beta": 0.7}, "permute": {}, "average": {}}

Spaces = list[tuple[str | int, int]]
"""The channels along an axis, in order: (space, copies of each channel), or a number of fixed channels."""


@dataclass(frozen=True)
class Case:
    """A network, and for each layer of its trunk the channels that it gives and takes, written by hand."""

    net: Net
    layers: Mapping[str, tuple[Spaces, Spaces]] = field(default_factory=dict)
    vectors: Mapping[str, str] = field(default_factory=dict)


def image(n: int = 3) -> Spaces:
    return [(n, 1)]


def of(*names: str, copies: int = 1) -> Spaces:
    return [(name, copies) for name in names]


def residual(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.norm(m.a(x)))
    x = F.relu(x + m.c(F.relu(m.b(x))))
    return m.head(x.mean((2, 3)))


def joined(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    x = m.norm(torch.cat([x, F.relu(m.b(x))], 1))
    return m.head(F.relu(m.c(x)).mean((2, 3)))


def flattened(m: Net, x: Tensor) -> Tensor:
    return m.head(F.relu(m.fc(F.max_pool2d(F.relu(m.a(x)), 2).flatten(1))))


def functional(m: Net, x: Tensor) -> Tensor:
    x = F.relu(F.conv2d(x, m.a.weight, m.a.bias, padding=1))
    x = F.relu(F.linear(x.movedim(1, -1), m.b.weight, m.b.bias))
    return m.head(m.norm(x).mean((1, 2)))


def tower(**layers: nn.Module) -> Net:
    return Net(chain, a=conv(3, layers.pop("width", 8)), act=nn.ReLU(), **layers)  # type: ignore[arg-type]


LINEAR, UP = nn.Linear, nn.ConvTranspose2d
CASES = {
    "plain": Case(
        tower(norm=nn.BatchNorm2d(8), b=conv(8, 6), act2=nn.ReLU(), head=LINEAR(6, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a"))},
        {"norm": "a"},
    ),
    "residual": Case(
        Net(residual, a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 6), c=conv(6, 8), head=LINEAR(8, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a")), "c": (of("a"), of("b"))},
        {"norm": "a"},
    ),
    "concatenation": Case(
        Net(joined, a=conv(3, 8), b=conv(8, 4), norm=nn.BatchNorm2d(12), c=conv(12, 5), head=LINEAR(5, 3)),
        {
            "a": (of("a"), image()),
            "b": (of("b"), of("a")),
            "c": (of("c"), of("a", "b")),
            "norm": (of("a", "b"), []),
        },
    ),
    "flatten": Case(
        Net(flattened, a=conv(3, 8), fc=LINEAR(8 * 16, 6), head=LINEAR(6, 3)),
        {"a": (of("a"), image()), "fc": (of("fc"), of("a", copies=16))},
    ),
    "functions": Case(
        Net(functional, a=conv(3, 8), b=LINEAR(8, 6), norm=nn.LayerNorm(6), head=LINEAR(6, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a"))},
        {"norm": "b"},
    ),
    "grouped": Case(
        tower(b=conv(8, 12, groups=4), act2=nn.ReLU(), head=LINEAR(12, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a"))},
    ),
    "depthwise": Case(
        tower(b=conv(8, 8, groups=8), norm=nn.BatchNorm2d(8), act2=nn.ReLU(), head=LINEAR(8, 3)),
        {"a": (of("a"), image()), "b": (of("a"), of("a"))},
        {"norm": "a"},
    ),
    "depthwise with multiplier": Case(
        tower(b=conv(8, 16, groups=8), act2=nn.ReLU(), head=LINEAR(16, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a"))},
    ),
    "groups of one output": Case(
        tower(b=conv(8, 4, groups=4), act2=nn.ReLU(), head=LINEAR(4, 3)),
        {"a": (of("a"), image()), "b": (of("b"), of("a"))},
    ),
    "transposed": Case(
        tower(up=UP(8, 6, 2, 2), act2=nn.ReLU(), b=conv(6, 4), act3=nn.ReLU(), head=LINEAR(4, 3)),
        {"a": (of("a"), image()), "up": (of("up"), of("a")), "b": (of("b"), of("up"))},
    ),
    "transposed, grouped": Case(
        tower(up=UP(8, 12, 2, 2, groups=4), act2=nn.ReLU(), head=LINEAR(12, 3)),
        {"a": (of("a"), image()), "up": (of("up"), of("a"))},
    ),
    "transposed, depthwise": Case(
        tower(up=UP(8, 8, 2, 2, groups=8), act2=nn.ReLU(), head=LINEAR(8, 3)),
        {"a": (of("a"), image()), "up": (of("a"), of("a"))},
    ),
    "transposed, depthwise with multiplier": Case(
        tower(up=UP(8, 16, 2, 2, groups=8), act2=nn.ReLU(), head=LINEAR(16, 3)),
        {"a": (of("a"), image()), "up": (of("up"), of("a"))},
    ),
}


@functools.cache
def prepared_models(name: str, count: int) -> tuple[list[nn.Module], fxzip.Prepared]:
    models = []
    for seed in range(count):
        model = copy.deepcopy(CASES[name].net)
        for layer in model.children():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        models.append(randomise(model, X, seed))
    return models, fxzip.prepare(*models, example_inputs=X).observe([X], progress=False)


def full(layer: nn.Module) -> Tensor:
    """The weight as one matrix for each kernel position, float64 of shape (out, in, positions)."""
    weight = layer.weight.detach().double()
    if weight.dim() == 1:
        return torch.diag(weight)[:, :, None]
    weight = weight.reshape(*weight.shape[:2], -1)
    groups = getattr(layer, "groups", 1)
    blocks = [[block[..., k] for k in range(weight.shape[2])] for block in weight.chunk(groups)]
    dense = torch.stack([torch.block_diag(*(block[k] for block in blocks)) for k in range(weight.shape[2])], -1)
    return dense.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else dense


def axis_matrix(spaces: Spaces, maps: Mapping[str, MergeMap], model: int, count: int, role: str) -> Tensor:
    """M_p (merged × own) or U_p (own × merged) along an axis."""
    parts = []
    for space, copies in spaces:
        if isinstance(space, int):
            part = torch.eye(space, dtype=torch.float64)
            part = part / count if role == "merge" else part
        else:
            found = maps[space]
            n = found.merge.shape[0]
            own = slice(model * n, (model + 1) * n)
            part = found.merge[:, own] if role == "merge" else found.unmerge[own]
        parts.append(torch.kron(part, torch.eye(copies, dtype=torch.float64)))
    return torch.block_diag(*parts)


def dense_rule(layers: list[nn.Module], out: Spaces, into: Spaces, maps: Mapping[str, MergeMap]) -> Tensor:
    """M blockdiag(W_1, ..., W_N) U for each kernel position."""
    weights, count = [full(layer) for layer in layers], len(layers)
    merge = torch.cat([axis_matrix(out, maps, model, count, "merge") for model in range(len(layers))], 1)
    unmerge = torch.cat([axis_matrix(into, maps, model, count, "unmerge") for model in range(len(layers))], 0)
    positions = range(weights[0].shape[2])
    return torch.stack([merge @ torch.block_diag(*(w[..., k] for w in weights)) @ unmerge for k in positions], -1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_papers_rule_is_exact(name: str, count: int) -> None:
    case = CASES[name]
    models, prepared = prepared_models(name, count)
    spaces = {space.name for space in prepared.spec.spaces}
    for method, options in METHODS.items():
        maps = match_spaces(prepared.spec, prepared.moments, method, count, spaces, **options)
        trunk = split(MergePlan(prepared.alignment, prepared.spec, maps, 0, prepared.place(None))).trunk
        state = trunk.state_dict()
        checked = set()
        for key, (out, into) in case.layers.items():
            layers = [model.get_submodule(key) for model in models]
            merge = torch.cat([axis_matrix(out, maps, model, count, "merge") for model in range(count)], 1)
            for part in ("bias", "running_mean", "running_var", *(["weight"] if not into else [])):
                if getattr(layers[0], part, None) is not None:
                    expected = merge @ torch.cat([getattr(layer, part).detach().double() for layer in layers])
                    assert (state[f"{key}.{part}"] - expected).abs().max() < 1e-6
                    checked.add(f"{key}.{part}")
            if into:
                merged = copy.deepcopy(layers[0])
                merged.weight.data = state[f"{key}.weight"]
                assert (full(merged) - dense_rule(layers, out, into, maps)).abs().max() < 1e-6, (method, key)
                checked.add(f"{key}.weight")
        for key, space in case.vectors.items():
            for part in ("weight", "bias", "running_mean", "running_var"):
                vectors = [getattr(model.get_submodule(key), part, None) for model in models]
                if vectors[0] is not None:
                    expected = maps[space].merge @ torch.cat([v.detach() for v in vectors])
                    assert (state[f"{key}.{part}"] - expected).abs().max() < 1e-6
                    checked.add(f"{key}.{part}")
        assert {key for key in state if not key.endswith("num_batches_tracked")} == checked
        if method == "zip" and name in ("plain", "residual"):
            assert any(found.within_share > 0 for found in maps.values())


def test_what_lies_in_no_space_is_averaged_and_integers_are_the_first_ones() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert fuse_parameter([a, b], []).tolist() == [2, 4]
    assert fuse_parameter([torch.tensor(3), torch.tensor(5)], []).item() == 3
    merged = fuse_parameter([a.bfloat16(), b.bfloat16()], [])
    assert merged.dtype == torch.bfloat16
    assert a.tolist() == [1, 2]


def test_the_parameters_of_the_models_are_left_alone() -> None:
    models, prepared = prepared_models("plain", 2)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in prepared.alignment.modules]
    prepared.convert(cut="b", progress=False)
    for module, state in zip(prepared.alignment.modules, before, strict=True):
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert len(models) == 2
