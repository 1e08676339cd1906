"""The memory of a merge: told before the work, and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxzip
from fxzip import RefitOptions
from fxzip.errors import OptionError
from fxzip.memory import bounded, in_bytes, need_of, parse_memory

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"method": "zip", "verify": False, "progress": False}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    return fxzip.prepare(net(0), net(1), example_inputs=X)


@pytest.mark.parametrize(
    ("given", "size"),
    [("4GB", 4 * 10**9), ("512 MB", 512 * 10**6), ("2GiB", 2 * 2**30), ("1.5k", 1500), (77, 77), (None, None)],
)
def test_sizes(given: Any, size: int | None) -> None:
    assert parse_memory(given) == size


@pytest.mark.parametrize("given", ["much", "-1GB", "0", 0, -3, 1.5, True, "4 GBs"])
def test_no_sizes(given: Any) -> None:
    with pytest.raises(OptionError, match="give a size like"):
        parse_memory(given)


def test_what_a_merge_needs(prepared: fxzip.Prepared) -> None:
    """By hand: two channel spaces of 32 and 16 channels, 3 * 9 and 32 * 9 inputs of the convolutions."""
    need = need_of(prepared, RefitOptions(least_images=10))
    weights = 4 * (32 * 27 + 32 + 16 * 288 + 16 + 5 * 16 + 5)
    assert need.networks == 3 * weights
    assert need.moments == 8 * (64**2 + 32**2)
    assert need.statistic == 4 * 8 * 288**2
    assert need.values == 10 * 3 * 4 * 16 * 16 * (32 + 32 + 32)  # around the first ReLU, of three networks
    assert str(need).startswith(f"{in_bytes(need.total)} (networks 67.3 kB, moments 41.0 kB")


def test_too_little_is_refused_before_the_work() -> None:
    def unread() -> Any:
        yield X
        raise AssertionError("it was read")

    class Once:
        __iter__ = lambda self: unread()  # noqa: E731

    with pytest.raises(OptionError, match=r"memory=2.0 MB: this merge needs some .* at the least.*cut="):
        fxzip.zip(net(0), net(1), Once(), memory="2MB", **OPTIONS)


def test_what_is_left_goes_to_images(prepared: fxzip.Prepared) -> None:
    refit = RefitOptions(least_images=10)
    need = need_of(prepared, refit)
    found = bounded(prepared, need.total + 1000, refit)
    assert found is not None
    assert found.memory == need.values + 1000
    assert bounded(prepared, 10**12, refit) == refit
    assert bounded(prepared, None, refit) is refit


def test_less_memory_is_fewer_images(prepared: fxzip.Prepared) -> None:
    batches = list(torch.rand(1200, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(10))
    refit = RefitOptions(least_images=10, rounds=0)
    least = need_of(prepared, refit).total
    some, many = (
        fxzip.zip(net(0), net(1), batches, memory=memory, refit=refit, **OPTIONS).report.fidelity
        for memory in (least, "1GB")
    )
    assert some is not None
    assert many is not None
    assert 10 <= some.fitted < many.fitted


def test_moments_are_kept_where_they_are_wanted(prepared: fxzip.Prepared) -> None:
    prepared.observe([X], stats_device="cpu", progress=False)
    assert {seen.scatter.device.type for seen in prepared.moments.values()} == {"cpu"}
    with pytest.raises(OptionError, match="stats_device='nowhere' cannot keep sums"):
        prepared.observe([X], stats_device="nowhere", progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_in_full(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(64, 3, 16, 16, generator=generator) * 4 * torch.rand(64, 3, 1, 1, generator=generator)
    batches = list(images.split(16))
    exact = fxzip.zip(net(0), net(1), batches, refit=RefitOptions(rounds=0), **OPTIONS)
    half = fxzip.zip(net(0).to(dtype), net(1).to(dtype), batches, refit=RefitOptions(rounds=0), **OPTIONS)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert half.report.fidelity is not None
    assert exact.report.fidelity is not None
    assert half.report.fidelity.unexplained < exact.report.fidelity.unexplained + 0.03
