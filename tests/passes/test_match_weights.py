"""Weight matching: what S is, that descent finds a hidden permutation, that no data is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxzip
from fxzip.passes.match_weights import match_by_weights, weight_similarity
from tests.nets import Net, Residual, chain, conv, pair, permuted_copy
from tests.oracles import TOLERANCE, images, randomise, self_zip_errors

X = images(8, 8)


def plain() -> Net:
    return Net(chain, a=conv(3, 6), act=nn.ReLU(), b=conv(6, 4), act2=nn.ReLU(), head=nn.Linear(4, 2))


def test_the_similarity_is_the_product_of_what_produces_and_contracts() -> None:
    one, two = pair(plain, X)
    spec = fxzip.analyse(one, X)
    states = [model.state_dict() for model in (one, two)]
    found = weight_similarity(spec, spec["a"], states, {})
    expected = one.a.weight.flatten(1) @ two.a.weight.flatten(1).T + torch.outer(one.a.bias, two.a.bias)
    expected += one.b.weight.transpose(0, 1).flatten(1) @ two.b.weight.transpose(0, 1).flatten(1).T
    assert torch.allclose(found[:6, 6:], expected)
    assert torch.equal(found, found.T)
    assert not found[:6, :6].any()
    cosine = weight_similarity(spec, spec["a"], states, {}, cosine=True)
    assert float(cosine.abs().max()) <= 1
    same = weight_similarity(spec, spec["a"], [states[0]] * 2, {}, cosine=True)
    assert torch.allclose(same[:6, 6:].diagonal(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("make", [plain, Residual])
@pytest.mark.parametrize("count", [2, 3])
def test_descent_finds_hidden_permutations(make: type[nn.Module], count: int) -> None:
    model = randomise(make(), X)
    models = [model, *(permuted_copy(model, X) for _ in range(count - 1))]
    spec = fxzip.analyse(model, X)
    states = [m.state_dict() for m in models]
    maps = match_by_weights(spec, states, [space.name for space in spec.spaces])
    for space in spec.spaces:
        assert torch.equal(maps[space.name].merge.sum(1), torch.ones(space.size, dtype=torch.float64))
        weights = [state[space.sites[0].parameter].double().flatten(1) for state in states if space.sites[0].axis == 0]
        if weights[0].shape[1] == 27:  # the first layer: its inputs are not permuted
            merged = maps[space.name].merge @ torch.cat(weights)
            assert torch.allclose(merged, weights[0])


@pytest.mark.parametrize("method", ["weights", "dual"])
def test_a_self_zip_by_weights_is_exact(method: str) -> None:
    errors = self_zip_errors(randomise(Residual(), X), X, methods=(method,))
    assert max(errors.values()) < TOLERANCE


def test_the_blend_reads_the_activations() -> None:
    prepared = fxzip.prepare(*pair(Residual, X), example_inputs=X).observe([X], progress=False)
    rows = {}
    for gamma in (0.0, 1.0):
        zipped = prepared.convert(method="dual", gamma=gamma, refit=False, progress=False)
        rows[gamma] = [row.correlation for row in zipped.report.spaces]
    activations = prepared.convert(method="permute", refit=False, progress=False).report.spaces
    assert rows[1.0] == pytest.approx([row.correlation for row in activations])
    assert sum(rows[0.0]) < sum(rows[1.0])
