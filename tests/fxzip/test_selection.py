"""`select` and `cca`, on covariances of random channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxzip.errors import OptionError
from fxzip.matching import evidence, match
from fxzip.matching.selection import pivots, regression


def channels(count: int, models: int = 2, samples: int = 4000, seed: int = 0) -> np.ndarray:
    """Correlated channels of several models, (samples, Σn)."""
    rng = np.random.default_rng(seed)
    sources = rng.standard_normal((samples, 2 * count))
    return np.concatenate([sources @ rng.standard_normal((2 * count, count)) for _ in range(models)], axis=1)


def covariance(x: np.ndarray) -> np.ndarray:
    return np.cov(x.T, bias=True)


def test_pivots_are_the_greatest_unexplained_variances() -> None:
    x = channels(6)
    c = covariance(x)
    found = pivots(c, 5)
    for step in range(5):
        kept = found[:step]
        explained = c[:, kept] @ np.linalg.pinv(c[np.ix_(kept, kept)]) @ c[kept] if step else 0 * c
        assert found[step] == np.argmax(np.diag(c - explained))


@pytest.mark.parametrize("models", [2, 3])
def test_select_keeps_channels_and_finds_the_others_by_least_squares(models: int) -> None:
    x = channels(5, models)
    found = match("select", covariance(x), n_models=models)
    kept = found.merge.argmax(1)
    assert torch.equal(found.merge.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(found.merge[torch.arange(5), kept], torch.ones(5, dtype=torch.float64))
    assert kept.tolist() == sorted(set(kept.tolist()))
    centred = x - x.mean(0)
    best = np.linalg.lstsq(centred[:, kept], centred, rcond=None)[0].T
    assert np.allclose(found.unmerge.numpy(), best, atol=1e-6)
    assert torch.equal(found.unmerge[kept], torch.eye(5, dtype=torch.float64))


def test_select_leaves_less_unexplained_than_any_pairing() -> None:
    x = channels(8)
    c = covariance(x)

    def unexplained(method: str, matrix: np.ndarray) -> float:
        merge = match(method, matrix).merge.numpy()
        kept = merge @ c @ merge.T
        return float(np.trace(c - c @ merge.T @ np.linalg.inv(kept) @ merge @ c))

    scale = np.sqrt(np.diag(c))
    correlation = c / scale[:, None] / scale[None, :]
    others = [unexplained(method, correlation) for method in ("average", "permute", "zip")]
    assert unexplained("select", c) < min(others)


def test_shares_of_a_selection_are_shares() -> None:
    found = match("select", covariance(channels(8)))
    assert 0 <= found.within_share <= 1
    assert -1 <= found.mean_correlation(np.corrcoef(channels(8).T)) <= 1


def test_a_larger_model_is_not_preferred() -> None:
    x = channels(8, seed=3)
    larger = x * np.repeat([1.0, 50.0], 8)
    plain, scaled = match("select", covariance(x)), match("select", covariance(larger))
    assert torch.equal(plain.merge, scaled.merge)


def test_dead_channels_are_kept_last() -> None:
    x = channels(4)
    x[:, [0, 5, 6]] = 7.0
    found = match("select", covariance(x))
    assert set(found.merge.argmax(1).tolist()).isdisjoint({0, 5, 6})
    assert not found.unmerge[[0, 5, 6]].any()
    nothing = match("select", np.zeros((8, 8)))
    assert bool(torch.isfinite(nothing.unmerge).all())


def test_fewer_samples_than_channels() -> None:
    x = channels(8, samples=4)
    found = match("select", covariance(x))
    assert len(set(found.merge.argmax(1).tolist())) == 8
    merged = (x - x.mean(0)) @ found.merge.numpy().T
    assert np.allclose(merged @ found.unmerge.numpy().T, x - x.mean(0), atol=1e-4)


def test_regression_of_kept_channels_is_exact() -> None:
    c = covariance(channels(4))
    kept = np.array([3, 1, 6, 4])
    assert np.allclose(regression(c, kept)[kept], np.eye(4), atol=1e-6)


@pytest.mark.parametrize("models", [2, 3])
def test_cca_undoes_a_linear_map(models: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 5)) @ rng.standard_normal((5, 5))
    maps = [np.eye(5), *(rng.standard_normal((5, 5)) for _ in range(models - 1))]
    found = match("cca", covariance(np.concatenate([x @ m for m in maps], 1)), n_models=models, gamma=1e-9)
    seen = np.concatenate([x @ m for m in maps], 1)
    merged = seen @ found.merge.numpy().T
    assert np.allclose(merged, x, atol=1e-3)
    assert np.allclose(merged @ found.unmerge.numpy().T, seen, atol=1e-2)


def test_cca_of_a_permuted_copy_is_the_permutation() -> None:
    x = channels(6, models=1)
    order = np.random.default_rng(1).permutation(6)
    c = covariance(np.concatenate([x, x[:, order]], 1))
    found = match("cca", c)
    assert np.allclose(found.merge[:, 6:].numpy() * 2, np.eye(6)[:, order], atol=1e-6)


def test_cca_needs_a_regular_covariance() -> None:
    with pytest.raises(OptionError, match="gamma > 0"):
        match("cca", np.zeros((4, 4)), gamma=0.0)


def test_what_matchers_want() -> None:
    assert [evidence(m) for m in ("zip", "select", "cca", "weights")] == [
        "correlation", "covariance", "covariance", "weights",
    ]  # fmt: skip
