"""Token ids for measuring language models: the sequences of a task, and a loader of batches for a merged network.

They come from an ``.npz`` archive with ``prose.tokens`` (n, length), whole numbers, or ``tokens`` for the only group;
and, where sequences are padded, ``prose.mask`` (n, length), 1 where a token counts and 0 where it is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxzip.data.batches import Given, Inputs, batch_size, describe_value, to_device
from fxzip.data.groups import array_name, read_arrays
from fxzip.data.loops import device_of, evaluating
from fxzip.errors import CalibrationError
from fxzip.exported import named_inputs
from fxzip.scores import LEFT_OUT, logits_for

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel

BATCH = 32
_CAUSAL = 1e-3
"""What a later token may change in a causal model's scores, by rounding: this share of the largest."""
_MASK, _POSITIONS = "attention_mask", "position_ids"
_FOLLOWING = (_MASK, _POSITIONS)
"""Inputs that follow from what is masked, by the names that Hugging Face's models have for them."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of one task.

    Attributes:
        name: The task, or "".
        ids: (n, length), whole numbers.
        mask: (n, length), 1 where a token counts; None: all do.

    Raises:
        CalibrationError: The arrays are of other shapes or types.
    """

    name: str
    ids: npt.NDArray[Any]
    mask: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        ids, mask = self.ids, self.mask
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise CalibrationError(f"{self.called}: {ids.dtype}{list(ids.shape)}; give whole numbers (n, length)")
        if mask is not None and (mask.shape != ids.shape or not np.isin(mask, (0, 1)).all()):
            shape = list(ids.shape)
            raise CalibrationError(
                f"{self.called}: the mask is {mask.dtype}{list(mask.shape)}; give 0 or 1 for each token, {shape}"
            )

    @property
    def called(self) -> str:
        """The array in an archive."""
        return array_name(self.name, "tokens")

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, numbers: Sequence[int]) -> Tokens:
        """Those of some sequences."""
        return Tokens(self.name, self.ids[numbers], None if self.mask is None else self.mask[numbers])


def find_tokens(path: Path) -> dict[str, Tokens]:
    """The groups of token ids in an .npz archive, by name; none in one of images, and in a folder.

    Raises:
        CalibrationError: The archive cannot be read, or arrays have unusable shapes.
    """
    if path.suffix != ".npz" or path.is_dir():
        return {}
    return {task: Tokens(task, *arrays) for task, arrays in read_arrays(path, "tokens", "mask").items()}


class TokenBatches:
    """Batches (inputs, labels) for one head of a merged language model, in the order of the sequences.

    Inputs have the form of the network's example: token ids, ``attention_mask`` and ``position_ids`` where it takes
    them, and what is no batch as it is there. Labels, int64 (batch, length), hold for each place the next token, or
    `LEFT_OUT` where there is none or its mask is 0.
    """

    def __init__(self, zipped: ZippedModel, task: str, ids: Any, mask: Any = None, *, batch_size: int = BATCH) -> None:
        """Make a loader, and see whether the network can be measured on it.

        Args:
            zipped: The network.
            task: The head.
            ids: An array or tensor (n, length) of whole numbers; the length is that which the network was traced with.
            mask: (n, length), 1 where a token counts, 0 where it is padding; None: all count.
            batch_size: Sequences in a batch.

        Raises:
            CalibrationError: The length is another, an id is not in the head's vocabulary, arrays have other shapes or
                types, no token is left to tell, or the network is no causal language model, or takes more than tokens.
            OptionError: There is no such task.
        """
        tokens = Tokens(task, _array(ids), None if mask is None else _array(mask))
        self._form = _Form.of(zipped)
        _check_length(task, tokens, self._form.length)
        _check_head(zipped, task, self._form, tokens.ids)
        self._ids = torch.from_numpy(tokens.ids.astype(np.int64))
        given = np.ones(tokens.ids.shape) if tokens.mask is None else tokens.mask
        self._mask = torch.from_numpy(given.astype(np.int64))
        self._size = batch_size
        if not bool(self._mask[:, 1:].any()):
            raise CalibrationError(
                f"{task}: no token follows another that could tell it, in {list(self._ids.shape)} tokens"
            )

    def __len__(self) -> int:
        return -(-len(self._ids) // self._size)

    def __iter__(self) -> Iterator[tuple[Given, Tensor]]:
        for ids, mask in zip(self._ids.split(self._size), self._mask.split(self._size), strict=True):
            labels = torch.full_like(ids, LEFT_OUT)
            labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, LEFT_OUT)
            yield self._form.inputs(ids, mask), labels

    def skipped(self) -> str | None:
        """What could not be read: nothing."""
        return None


@dataclass(frozen=True, eq=False)
class _Form:
    """The form of a language model's inputs.

    Attributes:
        example: Inputs of a few sequences.
        named: The same by name, those by position first.
        tokens: Which of them the ids are.
    """

    example: Inputs
    named: Mapping[str, Any]
    tokens: str

    @classmethod
    def of(cls, zipped: ZippedModel) -> _Form:
        """That of a network.

        Raises:
            CalibrationError: It takes no tokens, or more than tokens.
        """
        if zipped.example is None:
            raise CalibrationError("the network has no example of its inputs (zipped.example): nobody knows their form")
        named = named_inputs(zipped, zipped.example)
        batches = {name: value for name, value in named.items() if _is_batch(value, batch_size(*zipped.example))}
        whole = [name for name, value in batches.items() if value.dim() == 2 and not value.is_floating_point()]
        tokens = next((name for name in whole if name not in _FOLLOWING), None)
        if tokens is None:
            shown = ", ".join(f"{name} {describe_value(value)}" for name, value in named.items())
            raise CalibrationError(f"the network takes no token ids (batch, length), but {shown}")
        more = next((name for name in batches if name not in (tokens, *_FOLLOWING)), None)
        if more is not None:
            raise CalibrationError(
                f"the network also takes {more} ({describe_value(named[more])}), which does not follow from token ids: "
                "give fxzip.accuracy.measure batches (inputs, labels) of your own"
            )
        return cls(zipped.example, named, tokens)

    @property
    def length(self) -> int:
        """How many tokens a sequence has."""
        return int(self.named[self.tokens].shape[1])

    def inputs(self, ids: Tensor, mask: Tensor) -> Given:
        """The inputs of a batch of tokens.

        Args:
            ids: int64 (batch, length).
            mask: Of the same shape, 0 or 1.
        """
        made = {self.tokens: ids, _MASK: mask, _POSITIONS: (mask.cumsum(1) - 1).clamp(min=0)}
        size = batch_size(*self.example)
        values = {
            name: made[name].to(value.dtype) if name in made and _is_batch(value, size) else value
            for name, value in self.named.items()
        }
        by_place = len(self.example[0])
        return Given(tuple(values.values())[:by_place], dict(list(values.items())[by_place:]))


def _array(values: Any) -> npt.NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _is_batch(value: Any, size: int) -> bool:
    """Whether an input has a row for each sample."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _check_length(task: str, tokens: Tokens, length: int) -> None:
    """Raise unless sequences are as long as those that the network was traced with."""
    given = tokens.ids.shape[1]
    if given != length:
        raise CalibrationError(
            f"{task}: the sequences have {given} tokens, and the network was traced with {length} and takes no others: "
            f"cut or pad them to {length} ({array_name(task, 'mask')} says what is padding), or merge anew with "
            f"sequences of {given}"
        )


def _check_head(zipped: ZippedModel, task: str, form: _Form, ids: npt.NDArray[Any]) -> None:
    """Raise unless a head gives scores for the next token at each place, and the ids are among those tokens."""
    example = form.named[form.tokens].to(torch.int64)
    logits = _logits(zipped, task, form, example)
    size = logits.shape[-1]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise CalibrationError(
            f"{task}: the token ids are {low} to {high}, and the vocabulary of its head is 0 to {size - 1}: "
            "give ids of the tokenizer that the network was trained with, in masked places, too"
        )
    example = example.clone()
    example[:, -1] = (example[:, -1] + 1) % size
    gap = (_logits(zipped, task, form, example) - logits)[:, :-1].abs().max() if example.shape[1] > 1 else 0.0
    if gap > _CAUSAL * logits.abs().max():
        raise CalibrationError(
            f"{task}: what its head gives for a token depends on the tokens behind it, so it does not tell the next "
            "one: perplexity is of causal language models"
        )


def _logits(zipped: ZippedModel, task: str, form: _Form, ids: Tensor) -> Tensor:
    """A head's scores for a few sequences without padding."""
    args, kwargs = to_device(*form.inputs(ids, torch.ones_like(ids)), device_of(zipped))
    with torch.no_grad(), evaluating(zipped):
        return logits_for(zipped(*args, task=task, **kwargs), task, ids.shape).float()
