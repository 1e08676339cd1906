"""Images that are held back: how many, which, and that they stay so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxzip.data.batches import Given
from fxzip.data.calibration import Images
from fxzip.data.held import HeldBack, count_images, one_of, without


def batches(count: int, size: int) -> list[Tensor]:
    return list(torch.arange(count, dtype=torch.float32)[:, None].split(size))


def read(loader: list[Tensor], most: int = 512) -> HeldBack:
    held = HeldBack(loader, most)
    for batch in loader:
        held.rest((batch,), {})
    return held


@pytest.mark.parametrize(
    ("count", "size", "wanted"),
    [(3, 3, 0), (8, 8, 2), (100, 10, 25), (640, 64, 64), (2000, 100, 200), (9000, 100, 512)],
)
def test_a_tenth_is_held_back_more_of_few_and_no_more_of_many(count: int, size: int, wanted: int) -> None:
    held = read(batches(count, size))
    found = count_images(held.held)
    assert wanted <= found < wanted + size / 2
    assert held.given == count - found


def test_none_is_held_back_where_none_is_wanted() -> None:
    held = read(batches(100, 10), most=0)
    assert (held.held, held.given) == ([], 100)


def test_a_loader_of_unknown_length_counts_as_long() -> None:
    held = HeldBack(iter(batches(100, 10)))
    rest = held.rest((torch.zeros(10, 1),), {})
    assert rest is not None
    assert rest.tolist().count(False) == 1


def test_they_stay_held_back_in_any_order() -> None:
    loader = batches(100, 10)
    held = read(loader).held
    kept = {float(x) for batch in held for x in batch.args[0]}
    data = TensorDataset(torch.cat(loader))
    shuffled = DataLoader(data, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0))
    rest = [float(x) for batch in without(shuffled, held) for x in batch.args[0]]
    assert sorted([*rest, *kept]) == list(range(100))


def test_of_equal_images_some_are_left() -> None:
    loader = [torch.zeros(12, 2)]
    held = read(loader)
    assert (count_images(held.held), held.given) == (3, 9)
    assert count_images(list(without(loader, held.held))) == 9


def test_keyword_inputs_and_what_has_no_batch_axis() -> None:
    x, table = torch.arange(8.0)[:, None], torch.zeros(3)
    held = HeldBack([x])
    held.rest((), {"x": x, "table": table})
    (batch,) = held.held
    assert batch.kwargs["x"].shape == (2, 1)
    assert torch.equal(batch.kwargs["table"], table)


@pytest.mark.parametrize("turns", [2, 5, 10])
def test_what_comes_in_turn_is_held_back_alike(turns: int) -> None:
    """Two tasks that alternate, ten classes in a circle."""
    picked = torch.arange(4000)[one_of(torch.arange(4000), 10)]
    assert len(picked) == 400
    assert (picked // 10).tolist() == list(range(400))
    assert (picked % turns).bincount(minlength=turns).min() > 0.7 * 400 / turns


def test_some_of_many_are_of_all() -> None:
    given = tuple(Given((batch,), {}) for batch in batches(100, 30))
    images = Images(given, tuple(len(batch.args[0]) for batch in given))
    few = images.thinned(40)
    found = torch.cat([batch.args[0] for batch in few.own]).flatten()
    assert len(found) == len(found.unique()) == few.count == 40
    assert found.diff().min() > 0
    assert 10 < int((found % 2).sum()) < 30
    assert images.thinned(100) is images
