"""From moments to maps: blocks first, then what lies in them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

import fxzip
from fxzip.matching import match
from fxzip.passes.match import block_scores, match_spaces
from tests.nets import Net, chain, conv, pair, permuted_copy
from tests.oracles import images, randomise

X = images(8, 8)


def grouped() -> Net:
    return Net(chain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 12, groups=4), act2=nn.ReLU(), head=nn.Linear(12, 3))


def multiplied() -> Net:
    return Net(
        chain, a=conv(3, 4), act=nn.ReLU(), b=conv(4, 8, groups=4), act2=nn.ReLU(), c=conv(8, 16, groups=8),
        act3=nn.ReLU(), head=nn.Linear(16, 3),
    )  # fmt: skip


def names(spec: fxzip.ChannelSpec) -> set[str]:
    return {space.name for space in spec.spaces}


@pytest.mark.parametrize("make", [grouped, multiplied])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("method", "options"), [("zip", {"alpha": 1.0, "beta": 1.0}), ("permute", {}), ("average", {})]
)
def test_blocks_move_as_wholes(make: type[Net], count: int, method: str, options: dict[str, float]) -> None:
    prepared = fxzip.prepare(*pair(make, X, count), example_inputs=X).observe([X], progress=False)
    maps = match_spaces(prepared.spec, prepared.moments, method, count, names(prepared.spec), **options)
    assert set(maps) == names(prepared.spec)
    nested = [space for space in prepared.spec.spaces if space.parent]
    assert nested
    for space in nested:
        blocks = maps[str(space.parent)]
        n, width = space.size, space.size // blocks.merge.shape[0]
        own = torch.cat([space.block + model * blocks.merge.shape[0] for model in range(count)])
        assert torch.equal(maps[space.name].assignment // width, blocks.assignment[own])
        # Blocks are put together one of each model.
        assert (blocks.unmerge.reshape(count, -1, blocks.merge.shape[0]).sum(1) == 1).all()
        assert n == maps[space.name].merge.shape[0]


@pytest.mark.parametrize("make", [grouped, multiplied])
@pytest.mark.parametrize("method", ["zip", "permute"])
def test_a_permuted_copy_is_found_in_every_space(make: type[Net], method: str) -> None:
    model = randomise(make(), X)
    spec = fxzip.analyse(model, X)
    prepared = fxzip.prepare(model, spec.permute(model, Generator().manual_seed(3)), example_inputs=X)
    prepared.observe([X], progress=False)
    maps = match_spaces(prepared.spec, prepared.moments, method, 2, names(spec))
    for space in spec.spaces:
        if space.name in prepared.moments:
            assert maps[space.name].mean_correlation(prepared.moments[space.name].correlation) > 1 - 1e-6


def test_blocks_are_decided_by_what_lies_in_them_also_where_the_cut_comes_before() -> None:
    model = randomise(multiplied(), X)
    prepared = fxzip.prepare(model, permuted_copy(model, X), example_inputs=X).observe([X], progress=False)
    assert set(prepared.moments) == {"c"}  # a's channels are blocks of b's, and these of c's
    everything = match_spaces(prepared.spec, prepared.moments, "permute", 2, names(prepared.spec))
    for few in ({"a"}, {"a", "b"}):
        maps = match_spaces(prepared.spec, prepared.moments, "permute", 2, few)
        for name in few:
            assert torch.equal(maps[name].assignment, everything[name].assignment)


def test_parents_are_matched_too_and_no_more() -> None:
    prepared = fxzip.prepare(*pair(grouped, X), example_inputs=X).observe([X], progress=False)
    parent = prepared.spec["b"].parent
    assert set(match_spaces(prepared.spec, prepared.moments, "zip", 2, {"b"})) == {"b", parent}
    assert match_spaces(prepared.spec, prepared.moments, "zip", 2, ()) == {}


def test_a_space_that_was_not_observed_is_matched_by_position() -> None:
    prepared = fxzip.prepare(*pair(grouped, X), example_inputs=X)
    maps = match_spaces(prepared.spec, {}, "zip", 2, names(prepared.spec), alpha=0.5, beta=0.5)
    for found in maps.values():
        n = len(found.merge)
        assert found.assignment.tolist() == [*range(n), *range(n)]


def test_spaces_without_blocks_are_matched_as_they_are() -> None:
    model = Net(chain, a=conv(3, 8), act=nn.ReLU(), head=nn.Linear(8, 3))
    prepared = fxzip.prepare(*pair(lambda: model, X, 1), randomise(permuted_copy(model, X), X, 5), example_inputs=X)
    prepared.observe([X], progress=False)
    options = {"alpha": 0.3, "beta": 0.8}
    maps = match_spaces(prepared.spec, prepared.moments, "zip", 2, {"a"}, **options)
    expected = match("zip", prepared.moments["a"].correlation, n_models=2, **options)
    assert torch.equal(maps["a"].merge, expected.merge)


def brute_force(tile: Tensor) -> float:
    from itertools import permutations

    rows = range(len(tile))
    return max(sum(float(tile[r, c]) for r, c in zip(rows, order, strict=True)) for order in permutations(rows)) / len(
        tile
    )


@pytest.mark.parametrize("width", [1, 3])
def test_block_scores_are_those_of_the_best_assignment(width: int) -> None:
    models, blocks = 2, 2
    data = torch.randn(50, models * blocks * width, dtype=torch.float64)
    correlation = torch.corrcoef(data.T)
    scores = block_scores(correlation, models, blocks)
    tiles = correlation.reshape(4, width, 4, width).transpose(1, 2)
    for i in range(4):
        for j in range(4):
            expected = 0.0 if i // blocks == j // blocks else brute_force(tiles[i, j])
            assert abs(float(scores[i, j]) - expected) < 1e-9
