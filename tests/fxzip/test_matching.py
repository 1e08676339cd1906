import math
import sys

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lib.reference_zip import reference_zip_merges
from fxzip.errors import OptionError
from fxzip.matching import MergeMap, Setting, chosen_options, match, matcher, methods, settings_of, zip_merges
from fxzip.matching.registry import unregister
from fxzip.matching.similarity import as_similarity
from fxzip.settings import MATCHING

METHODS = ("average", "permute", "zip", "optimal")


def correlation(size: int, seed: int, samples: int = 20, common: float = 0.0) -> np.ndarray:
    """Correlations of channels with random mixtures of few factors, and one factor common to all."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((samples, max(2, size // 2)))
    x = latent @ rng.standard_normal((latent.shape[1], size)) + 0.5 * rng.standard_normal((samples, size))
    x += common * rng.standard_normal((samples, 1)) * math.sqrt(size)
    return np.corrcoef(x, rowvar=False).reshape(size, size)


def pair_weight(merge_map: MergeMap, similarity: np.ndarray) -> float:
    group = merge_map.assignment.numpy()
    return float(similarity[np.triu(group[:, None] == group[None, :], k=1)].sum())


def self_permuted(n: int, n_models: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of a model and permuted copies of it, and the assignment that undoes the permutations."""
    rng = np.random.default_rng(seed)
    order = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(n_models - 1))])
    x = rng.standard_normal((50, n))
    return np.corrcoef(np.concatenate([x[:, p] for p in order], axis=1), rowvar=False), order.reshape(-1)


def check_is_a_merge_map(merge_map: MergeMap, n: int, n_models: int) -> None:
    assert merge_map.merge.shape == (n, n * n_models)
    assert merge_map.unmerge.shape == (n * n_models, n)
    assert merge_map.merge.dtype == merge_map.unmerge.dtype == torch.float64
    assert bool(((merge_map.unmerge == 0) | (merge_map.unmerge == 1)).all())
    assert bool((merge_map.unmerge.sum(1) == 1).all())
    assert bool((merge_map.unmerge.sum(0) >= 1).all())
    torch.testing.assert_close(merge_map.merge.sum(1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(merge_map.merge @ merge_map.unmerge, torch.eye(n, dtype=torch.float64))


# --- zip against the plain reference -----------------------------------------------------------------------


@pytest.mark.parametrize("n_models", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["plain", "common", "ties", "negative", "constant", "dead"])
def test_zip_merges_what_the_reference_merges(n_models: int, alpha: float, beta: float, kind: str) -> None:
    for seed, n in enumerate([1, 2, 5, 12, 17]):
        similarity = correlation(n * n_models, seed, common=2.0 if kind == "common" else 0.0)
        if kind == "ties":
            similarity = np.round(similarity * 3) / 3
        elif kind == "negative":
            similarity = similarity - 0.9
        elif kind == "constant":
            similarity = np.full_like(similarity, 0.5)
        elif kind == "dead":
            dead = np.random.default_rng(seed).random(n * n_models) < 0.3
            similarity[dead] = similarity[:, dead] = 0.0
        expected = reference_zip_merges(similarity, n_models, alpha, beta)
        assert zip_merges(similarity, n_models, alpha, beta) == expected


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_zip_merges_what_the_reference_merges_on_few_levels(data: st.DataObject) -> None:
    n_models = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, 7))
    level = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])
    values = np.array(data.draw(st.lists(level, min_size=(n * n_models) ** 2, max_size=(n * n_models) ** 2)))
    similarity = np.triu(values.reshape(n * n_models, -1))
    similarity = similarity + np.triu(similarity, 1).T
    alpha = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    beta = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    assert zip_merges(similarity, n_models, alpha, beta) == reference_zip_merges(similarity, n_models, alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (1e-4, 0.05), (0.3, 0.125), (1.0, 1.0)])
def test_zip_merges_what_the_reference_merges_at_size(alpha: float, beta: float) -> None:
    similarity = correlation(240, seed=3, samples=60)
    assert zip_merges(similarity, 2, alpha, beta) == reference_zip_merges(similarity, 2, alpha, beta)


def test_zip_at_beta_zero_starts_no_more_groups_than_it_can_complete() -> None:
    # Three models a, b, c of two channels. The high pairs ab, ac, bc would be three features, no two of them
    # without a common model, where two are asked for: the third pair must wait, and c's channel completes ab.
    similarity = np.full((6, 6), 0.1)
    for i, j, value in [(0, 2, 0.9), (1, 4, 0.8), (3, 5, 0.7)]:
        similarity[i, j] = similarity[j, i] = value
    assert zip_merges(similarity, 3, 0.5, 0.0) == [(0, 2), (1, 4), (0, 5), (1, 3)]


def test_zip_breaks_ties_by_the_lowest_index() -> None:
    assert zip_merges(np.full((6, 6), 0.5), 2, 0.1, 1.0) == [(0, 1), (2, 3), (4, 5)]
    assert zip_merges(np.full((6, 6), 0.5), 2, 0.1, 0.0) == [(0, 3), (1, 4), (2, 5)]


def test_zip_spends_the_budget_of_the_lower_numbered_model() -> None:
    # 0 and 1 are one model's; its budget of one within-model merge at n = 4, beta = 0.5 is spent on (0, 1).
    similarity = np.full((8, 8), 0.1)
    for i, j, value in [(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7), (6, 7, 0.6)]:
        similarity[i, j] = similarity[j, i] = value
    assert zip_merges(similarity, 2, 0.5, 0.5) == [(0, 1), (4, 5), (2, 6), (3, 7)]
    assert zip_merges(similarity, 2, 0.5, 1.0) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_zip_keeps_what_was_forbidden_to_the_parts_of_a_merged_feature() -> None:
    # (0, 1) and (4, 5) spend both budgets of one. 6 may not be merged with 7 then, so (2, 6) may not either, though
    # it counts as the first model's; the released code of the paper gives the same.
    similarity = np.full((8, 8), 0.1)
    for i, j, value in [(0, 1, 0.9), (4, 5, 0.8), (2, 6, 0.7), (2, 7, 0.6), (6, 7, 0.6), (3, 7, 0.2)]:
        similarity[i, j] = similarity[j, i] = value
    assert zip_merges(similarity, 2, 0.5, 0.5) == [(0, 1), (4, 5), (2, 6), (3, 7)]


def test_zip_with_a_budget_below_one_lets_one_merge_within_each_model_through() -> None:
    similarity = np.full((8, 8), 0.1)
    for i, j, value in [(0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7), (2, 6, 0.6), (3, 7, 0.5)]:
        similarity[i, j] = similarity[j, i] = value
    assert zip_merges(similarity, 2, 0.5, 0.05) == [(0, 1), (4, 5), (2, 6), (3, 7)]


def test_zip_leaves_the_similarity_as_it_was() -> None:
    similarity = torch.from_numpy(correlation(20, 0))
    before = similarity.clone()
    match("zip", similarity)
    assert torch.equal(similarity, before)


# --- properties of all matchers ----------------------------------------------------------------------------


@given(st.sampled_from(METHODS), st.integers(1, 3), st.integers(1, 10), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_every_channel_goes_to_one_of_n_groups(method: str, n_models: int, n: int, seed: int) -> None:
    if method == "optimal" and n_models > 2:
        return
    check_is_a_merge_map(match(method, correlation(n * n_models, seed), n_models), n, n_models)


@given(
    st.integers(1, 3),
    st.integers(1, 10),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_zip_keeps_to_its_budget(n_models: int, n: int, alpha: float, beta: float, seed: int) -> None:
    similarity = correlation(n * n_models, seed)
    merge_map = match("zip", similarity, n_models, alpha=alpha, beta=beta)
    check_is_a_merge_map(merge_map, n, n_models)
    owner = np.arange(n * n_models) // n
    within = [owner[i] for i, j in zip_merges(similarity, n_models, alpha, beta) if owner[i] == owner[j]]
    budget = max(int(n * (n_models - 1) // n_models * beta + 1e-4), 1 if beta else 0)
    assert max(np.bincount(within, minlength=1)) <= budget
    lowest = [int(merge_map.assignment.tolist().index(group)) for group in range(n)]
    assert lowest == sorted(lowest)


@given(st.integers(2, 6), st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_zip_at_beta_zero_is_a_permutation(n_models: int, n: int, alpha: float, seed: int) -> None:
    merge_map = match("zip", correlation(n * n_models, seed), n_models, alpha=alpha, beta=0.0)
    for model in merge_map.assignment.reshape(n_models, n):
        assert sorted(model.tolist()) == list(range(n))
    assert merge_map.within_share == 0.0


@pytest.mark.parametrize("n_models", [2, 3])
@pytest.mark.parametrize("method", ["permute", "zip", "optimal"])
def test_a_permuted_copy_is_matched_back(method: str, n_models: int) -> None:
    if method == "optimal" and n_models > 2:
        return
    similarity, expected = self_permuted(9, n_models, seed=1)
    chosen = {"alpha": 1.0, "beta": 0.0} if method == "zip" else {}
    merge_map = match(method, similarity, n_models, **chosen)
    assert merge_map.assignment.tolist() == expected.tolist()
    assert merge_map.mean_correlation(similarity) == pytest.approx(1.0)


def test_average_is_the_identity() -> None:
    merge_map = match("average", correlation(12, 0), 3)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(merge_map.unmerge, torch.cat([eye] * 3))
    torch.testing.assert_close(merge_map.merge, torch.cat([eye] * 3, dim=1) / 3)


@given(st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_permute_has_the_greatest_weight_across_models(n: int, seed: int) -> None:
    similarity = correlation(2 * n, seed)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, n + j, similarity[i, n + j]) for i in range(n) for j in range(n))
    best = sum(similarity[i, j] for i, j in networkx.max_weight_matching(graph, maxcardinality=True))
    permuted = match("permute", similarity)
    assert pair_weight(permuted, similarity) == pytest.approx(best)
    assert permuted.assignment[:n].tolist() == list(range(n))
    greedy = match("zip", similarity, alpha=0.0, beta=0.0)
    assert pair_weight(permuted, similarity) >= pair_weight(greedy, similarity) - 1e-9


@given(st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_optimal_has_the_weight_that_networkx_finds(n: int, seed: int) -> None:
    similarity = correlation(2 * n, seed)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, similarity[i, j]) for i in range(2 * n) for j in range(i))
    best = sum(similarity[i, j] for i, j in networkx.max_weight_matching(graph, maxcardinality=True))
    merge_map = match("optimal", similarity)
    assert bool((merge_map.unmerge.sum(0) == 2).all())
    assert pair_weight(merge_map, similarity) == pytest.approx(best, abs=1e-9)
    for other in (match("zip", similarity, alpha=0.0, beta=0.0), match("permute", similarity)):
        assert pair_weight(merge_map, similarity) >= pair_weight(other, similarity) - 1e-9


@given(st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_optimal_finds_the_same_without_rustworkx(n: int, seed: int) -> None:
    similarity = correlation(2 * n, seed)
    expected = match("optimal", similarity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rustworkx", None)
        assert match("optimal", similarity).assignment.tolist() == expected.assignment.tolist()


@pytest.mark.parametrize("method", ["permute", "zip", "optimal"])
def test_dead_channels_match_last(method: str) -> None:
    # Every correlation across the models is negative, yet the dead channels are left for each other.
    similarity = -np.abs(correlation(12, 4))
    dead = [2, 9]
    similarity[dead] = similarity[:, dead] = 0.0
    chosen = {"alpha": 0.5, "beta": 0.0} if method == "zip" else {}
    assignment = match(method, similarity, **chosen).assignment
    assert assignment[2] == assignment[9]
    if method == "zip":
        assert zip_merges(similarity, 2, 0.5, 0.0)[-1] == (2, 9)


@pytest.mark.parametrize("method", METHODS)
def test_all_channels_dead(method: str) -> None:
    check_is_a_merge_map(match(method, np.zeros((8, 8))), 4, 2)


@pytest.mark.parametrize("method", METHODS)
def test_one_model_is_left_as_it_is(method: str) -> None:
    merge_map = match(method, correlation(5, 0), n_models=1)
    assert torch.equal(merge_map.merge, torch.eye(5, dtype=torch.float64))
    assert merge_map.within_share == 0.0
    assert math.isnan(merge_map.mean_correlation(correlation(5, 0)))


@pytest.mark.parametrize("method", METHODS)
def test_tensors_and_arrays_of_any_float_type_give_the_same(method: str) -> None:
    similarity = correlation(16, 2).astype(np.float32)
    expected = match(method, similarity).assignment
    assert torch.equal(match(method, torch.from_numpy(similarity)).assignment, expected)
    assert torch.equal(match(method, similarity.astype(np.float64)).assignment, expected)
    assert torch.equal(match(method, np.triu(similarity)).assignment, expected)


# --- MergeMap ----------------------------------------------------------------------------------------------


def test_merge_map_of_an_assignment() -> None:
    merge_map = MergeMap.from_assignment([0, 0, 1, 0, 2, 2], n_models=2)
    assert merge_map.assignment.tolist() == [0, 0, 1, 0, 2, 2]
    assert merge_map.assignment.dtype == torch.int64
    assert merge_map.merge[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3, 0, 0])
    # Pairs: (0, 1) within, (0, 3) and (1, 3) across, (4, 5) within.
    assert merge_map.within_share == 0.5
    similarity = np.zeros((6, 6))
    similarity[0, 1], similarity[0, 3], similarity[1, 3], similarity[4, 5] = 0.1, 0.2, 0.3, 0.8
    assert merge_map.mean_correlation(similarity) == pytest.approx(0.35)
    assert merge_map.mean_correlation(torch.from_numpy(similarity + similarity.T)) == pytest.approx(0.35)


@pytest.mark.parametrize("assignment", [[], [0, 1, 2], [0, 2, 0, 2], [0, -1, 0, 1], [0.0, 1.0]])
def test_merge_map_refuses_what_is_no_assignment(assignment: list[float]) -> None:
    with pytest.raises(OptionError, match="assignment"):
        MergeMap.from_assignment(assignment, n_models=2)


def test_merge_map_refuses_a_similarity_of_another_size() -> None:
    with pytest.raises(OptionError, match="does not fit"):
        match("average", np.eye(4)).mean_correlation(np.eye(6))


# --- the registry and bad input ----------------------------------------------------------------------------


def test_methods_and_their_options() -> None:
    assert set(METHODS) <= set(methods())
    assert {method: settings_of(method) for method in MATCHING} == MATCHING
    assert chosen_options("zip", {"beta": np.float32(0.5)}) == {"alpha": 1.0, "beta": 0.5}
    assert chosen_options("permute", {}) == {}


def test_a_matcher_of_ones_own_declares_its_options() -> None:
    taken = []

    @matcher("turned", options={"by": Setting(1, "how far channels are turned", low=0)})
    def turned(similarity: np.ndarray, n_models: int, by: int) -> np.ndarray:
        taken.append(by)
        n = len(similarity) // n_models
        return np.concatenate([(np.arange(n) + k * by) % n for k in range(n_models)])

    try:
        assert match("turned", np.eye(6)).assignment.tolist() == [0, 1, 2, 1, 2, 0]
        assert match("turned", np.eye(6), by=2.0).assignment.tolist() == [0, 1, 2, 2, 0, 1]
        assert [type(by) for by in taken] == [int, int]
        with pytest.raises(OptionError, match=r"by=1\.5: it must be a whole number, 0 or more"):
            match("turned", np.eye(6), by=1.5)
    finally:
        unregister("turned")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'zip' is registered already"):
        matcher("zip")(lambda similarity, n_models: np.zeros(1))


def test_an_unknown_method_is_told_the_near_ones() -> None:
    with pytest.raises(OptionError, match="did you mean 'permute'"):
        match("permut", np.eye(4))
    with pytest.raises(OptionError, match=", ".join(map(repr, sorted(methods())))):
        match("xyz", np.eye(4))


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.5", None, True, np.float32(2)])
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"{name}=.*: it must be a number from 0 to 1"):
        match("zip", np.eye(4), **{name: value})


@pytest.mark.parametrize("method", ["average", "permute", "optimal"])
def test_an_option_that_a_method_does_not_take(method: str) -> None:
    with pytest.raises(OptionError, match=f"'{method}' has no option 'alpha'"):
        match(method, np.eye(4), alpha=0.5)
    with pytest.raises(OptionError, match="it takes alpha, beta"):
        match("zip", np.eye(4), gamma=0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("similarity", "n_models", "message"),
    [
        (np.zeros((4, 6)), 2, "square"),
        (np.zeros(4), 2, "square"),
        (np.zeros((0, 0)), 2, "square"),
        (np.eye(5), 2, "does not divide into 2"),
        (np.eye(4), 3, "does not divide into 3"),
        (np.eye(4), 0, "at least 1"),
        (np.eye(4), -1, "at least 1"),
        (np.eye(4), 1.5, "at least 1"),
        (np.full((4, 4), np.nan), 2, "NaN"),
        (torch.full((4, 4), math.inf), 2, "infinite"),
        (np.eye(4) * 1j, 2, "real numbers"),
        (torch.eye(4) * 1j, 2, "real numbers"),
        ([["a", "b"], ["c", "d"]], 2, "real numbers"),
    ],
)
def test_bad_similarities(method: str, similarity: np.ndarray, n_models: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        match(method, similarity, n_models)


@pytest.mark.parametrize("size", [2, 256, 258, 600])
def test_only_what_lies_above_the_diagonal_is_read(size: int) -> None:
    similarity = np.random.default_rng(0).standard_normal((size, size))
    upper = np.triu(similarity) + np.triu(similarity, k=1).T
    np.testing.assert_array_equal(as_similarity(similarity, 2), upper)
    np.testing.assert_array_equal(as_similarity(similarity.T.copy().T, 2), upper)


def test_optimal_takes_two_models_only() -> None:
    with pytest.raises(OptionError, match="two models, got 3"):
        match("optimal", np.eye(6), 3)


# --- any number of merged channels ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_models", [1, 2, 3])
@pytest.mark.parametrize("method", ["zip", "select"])
def test_any_number_of_channels_is_left(method: str, n_models: int) -> None:
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(200, 5 * n_models)) @ rng.normal(size=(5 * n_models, 5 * n_models))
    similarity = np.corrcoef(samples.T) if method == "zip" else np.cov(samples.T)
    for size in range(1, 5 * n_models + 1):
        found = match(method, similarity, n_models, size)
        assert found.size == size
        assert found.width == 5
        assert found.merge.shape == (size, 5 * n_models)
        assert found.unmerge.shape == (5 * n_models, size)
        assert torch.allclose(found.merge.sum(1), torch.ones(size, dtype=torch.float64))
        parts = [found.part(model, "produce") for model in range(n_models)]
        assert torch.equal(torch.cat(parts, 1), found.merge)
    all_kept = match(method, similarity, n_models, 5 * n_models)
    assert torch.equal(all_kept.merge @ all_kept.unmerge, torch.eye(5 * n_models, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_zip_goes_on_below_one_model(beta: float) -> None:
    rng = np.random.default_rng(0)
    similarity = np.corrcoef(rng.normal(size=(12, 30)))
    whole = zip_merges(similarity, 2, 1.0, beta)
    assert zip_merges(similarity, 2, 1.0, beta, 6) == whole
    if beta == 1:
        assert zip_merges(similarity, 2, 1.0, 1.0, 9)[:2] == whole[:2]
    for size in (1, 3, 9, 12):
        assert len(zip_merges(similarity, 2, 1.0, beta, size)) == 12 - size


def test_other_numbers_of_channels_take_a_method_that_has_them() -> None:
    with pytest.raises(OptionError, match=r"'permute' merges 2 times 3 channels into 3, not into 4.*'select' or 'zip'"):
        match("permute", np.eye(6), 2, 4)
    with pytest.raises(OptionError, match="6 channels cannot be merged into 7"):
        match("select", np.eye(6), 2, 7)
