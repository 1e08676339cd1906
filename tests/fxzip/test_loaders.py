"""A loader for each model, and loaders that are not the same twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import fxzip
from fxzip.data.loaders import Interleaved, as_one_loader
from fxzip.errors import OptionError
from tests.nets import Residual, pair
from tests.oracles import call, difference, images

X = images(12, 8)
NAMES = ("a", "b")


def loader(start: int, stop: int) -> DataLoader[Any]:
    return DataLoader(list(X[start:stop]), batch_size=2)


def test_batches_come_in_turn() -> None:
    both = as_one_loader([loader(0, 4), loader(4, 12)], NAMES)
    found = torch.cat(list(both))
    assert torch.equal(found, X[[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]])
    assert torch.equal(torch.cat(list(both)), found)
    assert len(both) == 6
    with pytest.raises(TypeError, match="list_iterator has no length"):
        len(Interleaved([iter([]), (x for x in X)]))


def test_a_dict_is_by_the_tasks_names() -> None:
    found = list(as_one_loader({"b": loader(4, 6), "a": loader(0, 2)}, NAMES))
    assert torch.equal(torch.cat(found), X[[0, 1, 4, 5]])
    with pytest.raises(OptionError, match="loaders for a, c, but tasks a, b"):
        as_one_loader({"a": loader(0, 2), "c": loader(4, 6)}, NAMES)


@pytest.mark.parametrize("given", [[X, X], [(X, 0), (X, 1)], [{"x": X}], [], loader(0, 4)])
def test_one_loader_stays_one(given: Any) -> None:
    assert as_one_loader(given, NAMES) is given


def test_loaders_of_unequal_number() -> None:
    with pytest.raises(OptionError, match="3 loaders for 2 models: give one for all, or one for each"):
        fxzip.zip(*pair(Residual, X), [loader(0, 2)] * 3, progress=False)


def test_a_merge_on_a_loader_for_each_model_is_that_on_both_together() -> None:
    models = pair(Residual, X)
    apart = fxzip.zip(*models, [loader(0, 6), loader(6, 12)], refit=False, progress=False)
    order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    together = fxzip.zip(*models, list(X[order].split(2)), refit=False, progress=False)
    assert difference(call(together, X), call(apart, X)) < 1e-9
    named = fxzip.zip(*models, {"u": loader(0, 6), "v": loader(6, 12)}, names=("u", "v"), refit=False, progress=False)
    assert difference(call(named, X), call(apart, X)) < 1e-9


@pytest.mark.parametrize("refit", [False, True])
def test_a_loader_that_gives_other_images_on_a_second_reading(refit: bool) -> None:
    shuffled = DataLoader(list(X), batch_size=3, shuffle=True)
    zipped = fxzip.zip(*pair(Residual, X), shuffled, refit=refit, progress=False)
    assert all(bool(torch.isfinite(out).all()) for out in call(zipped, X))
