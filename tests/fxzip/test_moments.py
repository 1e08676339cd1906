"""Moments and the Observer against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxzip import observer as observing
from fxzip.channels import MergePoint
from fxzip.errors import CalibrationError
from fxzip.moments import Moments
from fxzip.observer import Observer


def point(n: int, axes: tuple[int, ...] = (1,), start: int = 0) -> MergePoint:
    return MergePoint("act", axes, torch.arange(start, start + n)[:, None])


def flat(batches: list[tuple[Tensor, ...]]) -> np.ndarray:
    """Samples × channels of all models, of N × C × ... activations."""
    rows = [torch.cat(models, 1).double().movedim(1, -1).flatten(0, -2) for models in batches]
    return torch.cat(rows).numpy()


def oracle(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centred = samples - samples.mean(0)
    return samples.mean(0), centred.T @ centred


def assert_moments(found: Moments, samples: np.ndarray, tolerance: float = 2e-6) -> None:
    mean, scatter = oracle(samples)
    assert found.count == len(samples)
    assert found.mean.dtype == found.scatter.dtype == torch.float64
    assert np.abs(found.mean.numpy() - mean).max() <= tolerance * np.abs(samples).max()
    assert np.abs(found.scatter.numpy() - scatter).max() <= tolerance * scatter.max()
    assert torch.equal(found.scatter, found.scatter.T)


def draw(seed: int, sizes: tuple[int, ...] = (3, 5, 1), n: int = 20, models: int = 2) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(models * n, models * n, generator=generator)
    batches = []
    for size in sizes:
        joint = torch.einsum("cd,ndhw->nchw", mix, torch.randn(size, models * n, 5, 7, generator=generator))
        batches.append(joint.chunk(models, 1))
    return batches


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [20, 150])  # one GEMM, several panels
def test_equals_numpy(models: int, layout: torch.memory_format, n: int) -> None:
    batches = draw(0, n=n, models=models)
    observer = Observer(models, point(n))
    for batch in batches:
        observer(0, *(a.contiguous(memory_format=layout) for a in batch))
    assert_moments(observer.moments, flat(batches))


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "_SLICE", 40 * 9)  # nine samples at a time: less than an image
    batches = draw(1)
    observer = Observer(2, point(20))
    for batch in batches:
        observer(0, *batch)
    assert_moments(observer.moments, flat(batches))


def test_large_mean_small_variance() -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [(1e4 + 0.1 * torch.randn(8, 6, 9, 9, generator=generator),) * 2 for _ in range(4)]
    observer = Observer(2, point(6))
    for batch in batches:
        observer(0, *batch)
    assert_moments(observer.moments, flat(batches))
    # What would have been got without the shift: the test is worth something.
    samples = flat(batches).astype(np.float32)
    naive = samples.T @ samples / len(samples) - np.outer(samples.mean(0), samples.mean(0))
    assert np.abs(naive - 0.01).max() > 1


def test_batches_that_differ_in_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [(1000.0 * k + torch.randn(4, 6, 5, 5, generator=generator),) * 2 for k in range(5)]
    observer = Observer(2, point(6))
    for batch in batches:
        observer(0, *batch)
    assert_moments(observer.moments, flat(batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    batches = [tuple(a.to(dtype) for a in batch) for batch in draw(4)]
    observer = Observer(2, point(20))
    for batch in batches:
        observer(0, *batch)
    assert_moments(observer.moments, flat(batches), 1e-13 if dtype == torch.float64 else 2e-6)


def test_autocast_does_not_reach_the_products() -> None:
    batches = draw(4)
    observer = Observer(2, point(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches:
            observer(0, *batch)
    assert_moments(observer.moments, flat(batches))


def test_mixed_memory_formats_see_the_same_samples() -> None:
    ((a, b),) = draw(5, sizes=(4,))
    observer = Observer(2, point(20))
    observer(0, a, b.contiguous(memory_format=torch.channels_last))
    assert_moments(observer.moments, flat([(a, b)]))


def test_tokens_vectors_and_ranges() -> None:
    generator = torch.Generator().manual_seed(6)
    tokens = [torch.randn(3, 7, 12, generator=generator) for _ in range(2)]
    observer = Observer(2, point(12, (2,)))
    observer(0, *tokens)
    assert_moments(observer.moments, torch.cat(tokens, 2).double().flatten(0, 1).numpy())

    vectors = [torch.randn(9, 12, generator=generator) for _ in range(2)]
    observer = Observer(2, point(5, start=4))
    observer(0, *vectors)
    assert_moments(observer.moments, torch.cat([v[:, 4:9] for v in vectors], 1).double().numpy())


def test_copies_are_samples_and_points_are_pooled() -> None:
    generator = torch.Generator().manual_seed(7)
    maps = [torch.randn(6, 4, 2, 3, generator=generator) for _ in range(2)]
    flattened = MergePoint("flat", (1,), torch.arange(24).view(4, 6))  # C × H × W made one axis
    observer = Observer(2, point(4), flattened)
    observer(0, *maps)
    assert_moments(observer.moments, flat([tuple(maps)]))
    observer(1, *(a.flatten(1) for a in maps))
    assert_moments(observer.moments, flat([tuple(maps)] * 2))

    two_axes = MergePoint("heads", (1, 3), torch.tensor([[3], [0], [11], [5]]))
    observer = Observer(2, two_axes)
    observer(0, *maps)
    picked = torch.cat([a.permute(0, 2, 1, 3).reshape(-1, 12)[:, [3, 0, 11, 5]] for a in maps], 1)
    assert_moments(observer.moments, picked.double().numpy())


def test_channels_of_other_spaces_count_by_mean_and_size() -> None:
    """Whatever their order, and where their means cancel, too."""
    generator = torch.Generator().manual_seed(8)
    maps = [torch.randn(6, 4, 5, 3, generator=generator) for _ in range(2)]
    own = torch.arange(4)[:, None]
    observer = Observer(
        2, MergePoint("pooled", (1,), own, (2,)), MergePoint("mixed", (1, 2), torch.arange(20).view(4, 5), (), True)
    )
    observer(0, *maps)
    mean, size = (
        torch.cat([f(a) for a in maps], 1) for f in (lambda a: a.mean(2), lambda a: a.square().mean(2).sqrt())
    )
    wanted = torch.stack([mean, size]).permute(0, 1, 3, 2).flatten(0, 2).double().numpy()
    assert_moments(observer.moments, wanted)
    observer(1, *(a[:, :, torch.randperm(5, generator=generator)] for a in maps))
    assert_moments(observer.moments, np.concatenate([wanted, wanted]))

    opposed = [torch.cat([a, -a], 2) for a in maps]
    observer = Observer(2, MergePoint("pooled", (1,), own, (2,)))
    observer(0, *opposed)
    assert not observer.moments.dead.any()


def test_combine_is_the_whole_and_select_a_part() -> None:
    batches = draw(8)
    parts = []
    for batch in batches:
        observer = Observer(2, point(20))
        observer(0, *batch)
        parts.append(observer.moments)
    empty = Observer(2, point(20)).moments
    assert empty.count == 0
    whole = empty.combine(parts[0]).combine(parts[1]).combine(parts[2])
    assert_moments(whole, flat(batches))
    index = torch.tensor([30, 2, 17])
    assert_moments(whole.select(index), flat(batches)[:, index.numpy()])
    with pytest.raises(ValueError, match="40 and of 3"):
        whole.combine(whole.select(index))


def test_covariance_and_correlation() -> None:
    batches = draw(9)
    observer = Observer(2, point(20))
    for batch in batches:
        observer(0, *batch)
    np.testing.assert_allclose(observer.moments.covariance, np.cov(flat(batches).T, ddof=0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(observer.moments.correlation, np.corrcoef(flat(batches).T), atol=1e-6)


def test_dead_channels_correlate_with_nothing() -> None:
    generator = torch.Generator().manual_seed(10)
    a, b = (torch.randn(50, 5, 4, 4, generator=generator) for _ in range(2))
    a[:, 1] = 0
    b[:, 2] = 1234.5678  # the rounding of its mean is no variance
    b[:, 3] = 5000 + 5e-4 * (torch.rand(50, 4, 4, generator=generator) > 0.5)  # one rounding step
    b[:, 4] = 1e-8 * a[:, 4]  # tiny, not dead
    observer = Observer(2, point(5))
    observer(0, a[:20], b[:20])
    observer(0, a[20:], b[20:])
    moments = observer.moments
    assert moments.dead.nonzero().flatten().tolist() == [1, 7, 8]
    correlation = moments.correlation
    assert torch.isfinite(correlation).all()
    off = correlation - torch.eye(10)
    assert not off[[1, 7, 8]].any()
    assert not off[:, [1, 7, 8]].any()
    assert torch.equal(correlation.diagonal(), torch.ones(10, dtype=torch.float64))
    assert correlation[4, 9] > 1 - 1e-6


def test_one_sample_gives_no_nan() -> None:
    observer = Observer(2, point(3))
    observer(0, torch.randn(1, 3), torch.randn(1, 3))
    assert torch.equal(observer.moments.correlation, torch.eye(6, dtype=torch.float64))
    assert not observer.moments.covariance.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_the_node(value: float) -> None:
    a = torch.ones(4, 3, 5, 5)
    b = a.clone()
    b[2, 1, 3, 3] = value
    with pytest.raises(CalibrationError, match=r"'act'.*not finite"):
        Observer(2, point(3))(0, a, b)


def test_wrong_activations() -> None:
    observer = Observer(2, point(3))
    with pytest.raises(CalibrationError, match=r"differ in shape: \(4, 3\), \(4, 4\)"):
        observer(0, torch.ones(4, 3), torch.ones(4, 4))
    with pytest.raises(CalibrationError, match="2 channels on axes"):
        observer(0, torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(CalibrationError, match="lacks axes of"):
        observer(0, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="the same number of channels"):
        Observer(2, point(3), point(4))
    assert observer.moments.count == 0
