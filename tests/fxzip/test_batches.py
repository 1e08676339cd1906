"""What a loader gives, and what it may not."""

from __future__ import annotations

import pytest
import torch

from fxzip.data.batches import batch_size, model_inputs, to_device, with_batch_size
from fxzip.errors import CalibrationError

X = torch.arange(12.0).reshape(3, 4)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [X, (X, LABELS), [X, LABELS], [X], (X, {"label": LABELS}, "path")])
def test_the_first_tensor_is_the_input(batch: object) -> None:
    args, kwargs = model_inputs(batch)
    assert len(args) == 1
    assert args[0] is X
    assert kwargs == {}


@pytest.mark.parametrize("batch", [{"x": X, "flag": True}, ({"x": X, "flag": True}, LABELS)])
def test_a_dict_holds_keyword_inputs(batch: object) -> None:
    args, kwargs = model_inputs(batch)
    assert args == ()
    assert kwargs.keys() == {"x", "flag"}
    assert kwargs["x"] is X
    assert kwargs["flag"] is True


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (None, "gave None"),
        ([], "empty tuple or list"),
        ((), "empty tuple or list"),
        ("image.png", "gave a str"),
        (3, "gave an int"),
        (("image.png", X), "first element is a str"),
        (([X], LABELS), "first element is a list"),
        ({}, "empty dict"),
        ({1: X}, "key 1"),
        ({"path": "image.png"}, "without a tensor"),
    ],
)
def test_anything_else_is_refused_in_words(batch: object, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        model_inputs(batch)


def test_batch_size_is_that_of_the_first_tensor_with_an_axis() -> None:
    assert batch_size((torch.tensor(1.0), X), {}) == 3
    assert batch_size((), {"x": X}) == 3
    with pytest.raises(CalibrationError, match="batch axis"):
        batch_size((1, torch.tensor(1.0)), {})


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_another_batch_size_slices_or_repeats(n: int) -> None:
    table = torch.ones(5, 2)
    args, kwargs = with_batch_size((X, table, "flag"), {"labels": LABELS, "nested": [X]}, n)
    rows = [index % 3 for index in range(n)]
    assert torch.equal(args[0], X[rows])
    assert torch.equal(kwargs["labels"], LABELS[rows])
    assert torch.equal(kwargs["nested"][0], X[rows])
    assert args[1] is table
    assert args[2] == "flag"


def test_another_batch_size_keeps_the_memory_format() -> None:
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    for n in (2, 5):
        (y,), _ = with_batch_size((x,), {}, n)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_has_no_other_size() -> None:
    with pytest.raises(CalibrationError, match="batch of 0"):
        with_batch_size((X[:0],), {}, 2)
    with pytest.raises(CalibrationError, match="batch of 0"):
        with_batch_size((X,), {}, 0)


def test_to_device_moves_tensors_only() -> None:
    args, kwargs = to_device((X, 3), {"y": [X], "flag": None}, "meta")
    assert args[0].is_meta
    assert args[1] == 3
    assert kwargs["y"][0].is_meta
    assert kwargs["flag"] is None
