"""`pca`: streams merged by their principal components, where any orthogonal map is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import fxzip
from fxzip.matching import match
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.linearise import linearise
from fxzip.passes.rotate import random_rotations, rotate
from fxzip.passes.trace import trace
from tests.oracles import difference, randomise
from tests.zoo.test_language import GPT, WORDS

EXACT = 1e-9


def covariance(seed: int = 0, models: int = 2, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(200, models * n)) @ np.random.default_rng(seed + 1).normal(
        size=(models * n, models * n)
    )
    return np.cov(x.T), x


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 5])
def test_no_map_leaves_less(models: int, size: int) -> None:
    c, _ = covariance(models=models)
    scale = np.repeat(1 / np.sqrt(c.diagonal().reshape(models, -1).mean(1)), 5)
    alike = c * scale[:, None] * scale[None, :]
    found = match("pca", c, n_models=models, size=size)
    m, u = found.merge.numpy(), found.unmerge.numpy()
    back = np.eye(models * 5) - u @ m
    left = np.trace((back @ c @ back.T) * scale[:, None] * scale[None, :])
    assert left == pytest.approx(np.linalg.eigvalsh(alike)[: models * 5 - size].sum(), abs=1e-9)
    assert m @ u == pytest.approx(np.eye(size), abs=1e-9)


def test_what_is_merged_of_equal_channels_is_as_large_as_they_are() -> None:
    c, x = covariance(models=1)
    twice = np.block([[c, c], [c, c]])
    merged = np.concatenate([x, x], 1) @ match("pca", twice, n_models=2).merge.numpy().T
    assert np.linalg.norm(merged, axis=1) == pytest.approx(np.linalg.norm(x, axis=1))


def tokens(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (count, 6), generator=Generator().manual_seed(seed))


def language_model(seed: int = 0) -> nn.Module:
    return randomise(GPT(), tokens(), seed)


def turned(model: nn.Module, seed: int) -> nn.Module:
    """A model whose stream is another one's, turned by a random orthogonal map."""
    example = (tokens(),)
    graph = canonicalise(trace(model, example))
    module, spec = linearise(graph, analyse_graph(graph, example, {}))
    stream = max((space for space in spec.spaces if space.linear), key=lambda space: len(space.sites))
    maps = random_rotations(spec, Generator().manual_seed(seed))
    return rotate(spec, module, {stream.name: maps[stream.name]})


@pytest.mark.parametrize("refit", [False, True])
def test_a_network_and_a_turned_copy_of_it_are_one(refit: bool) -> None:
    """No map of whole channels does that: here the stream's channels have no counterparts."""
    model, x = language_model(), tokens()
    copy = turned(model, seed=1)
    assert difference(model(x), copy(x)) < EXACT
    prepared = fxzip.prepare(model, copy, example_inputs=x, linearise=True).observe([x], progress=False)
    zipped = prepared.convert(method="pca", refit=refit, progress=False)
    for head in zipped(x):
        assert difference(model(x), head) < (1e-4 if refit else 1e-7)
    whole = prepared.convert(method="permute", refit=False, progress=False)
    assert min(difference(model(x), head) for head in whole(x)) > 0.1


def test_zip_writes_networks_so_that_it_is_exact(tmp_path: Path) -> None:
    models, x = [language_model(seed) for seed in range(2)], tokens()
    zipped = fxzip.zip(*models, [x], method="pca", width=1.25, progress=False)
    assert zipped.report.method == "pca"
    zipped.save(tmp_path / "merged")
    loaded = fxzip.load(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(zipped(x), loaded(x), strict=True))
    with pytest.raises(fxzip.RestoreError, match="linearise"):
        zipped.as_models()


def test_auto_tries_it_where_it_is_exact() -> None:
    models, x = [language_model(seed) for seed in range(2)], [tokens(64, seed) for seed in range(2)]
    prepared = fxzip.prepare(*models, example_inputs=x[0], linearise=True).observe(x, progress=False)
    zipped = prepared.convert(progress=False)
    assert [text.split()[0] for text in zipped.report.tried] == ["select", "zip", "pca"]
    plain = fxzip.prepare(*models, example_inputs=x[0]).observe(x, progress=False)
    assert [text.split()[0] for text in plain.convert(progress=False).report.tried] == ["select", "zip"]


class Once:
    """A loader of one batch, which is read for the example and not again."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.read = x, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.read += 1
        assert self.read == 1
        yield self.x


def test_what_was_observed_is_taken_up_again(tmp_path: Path) -> None:
    models, x = [language_model(seed) for seed in range(2)], tokens()
    prepared = fxzip.prepare(*models, example_inputs=x, linearise=True).observe([x], progress=False)
    prepared.save(tmp_path / "seen")
    again = fxzip.Prepared.load(tmp_path / "seen", *models, [x], linearise=True)
    options = {"method": "pca", "refit": False, "progress": False}
    assert all(map(torch.equal, prepared.convert(**options)(x), again.convert(**options)(x)))
    with pytest.raises(fxzip.OptionError, match="observed"):
        fxzip.Prepared.load(tmp_path / "seen", *models, [x])


def test_one_network_is_shrunk_by_it() -> None:
    """A bottleneck whose values lie in half as many directions as it has channels loses nothing."""
    wide = nn.Linear(12, 10, bias=False)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), wide, nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        wide.weight.copy_(torch.randn(10, 5).double() @ torch.randn(5, 12).double())
    x = torch.randn(64, 6, dtype=torch.float64)
    small = fxzip.shrink(model, [x], width={"2": 0.5}, method="pca", refit=False, progress=False)
    assert small.get_parameter("trunk.2.weight").shape == (5, 12)
    assert difference(model(x), small(x)[0]) < EXACT


def test_where_nothing_is_linear_it_is_refused_before_the_work() -> None:
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    with pytest.raises(fxzip.OptionError, match=r"pca.*linear.*in a way that is not linear; take .select"):
        fxzip.zip(*models, Once(torch.randn(4, 6)), method="pca", progress=False)
    text = [language_model(seed) for seed in range(2)]
    prepared = fxzip.prepare(*text, example_inputs=tokens()).observe([tokens()], progress=False)
    with pytest.raises(fxzip.OptionError, match="linearise=True"):
        prepared.convert(method="pca", progress=False)
    with pytest.raises(fxzip.OptionError, match="linearise"):
        fxzip.prepare(*text, example_inputs=tokens(), linearise="yes")
