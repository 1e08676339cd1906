"""The scores that a network gives: for the classes of each image, or for the next token of each place of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxzip.data.batches import describe_value
from fxzip.errors import CalibrationError
from fxzip.exported import tensors_in

LEFT_OUT = -100
"""The label of a place that is not measured, as of `torch.nn.functional.cross_entropy`."""


def logits_in(output: Any) -> Tensor | None:
    """The scores in an output: what is called logits, else the first tensor; None if that has none of floats."""
    named = output.get("logits") if isinstance(output, Mapping) else None
    found = [named] if isinstance(named, Tensor) else tensors_in(output)[:1]
    return next((tensor for tensor in found if tensor.is_floating_point() and tensor.dim()), None)


def logits_for(output: Any, task: str, labels: Sequence[int]) -> Tensor:
    """The scores (*labels, classes) in an output of a head.

    Args:
        output: The output.
        task: The head.
        labels: The shape of the labels: (batch,), or (batch, tokens).

    Raises:
        CalibrationError: They are not there, or have another shape.
    """
    logits = logits_in(output)
    if logits is not None and logits.shape[:-1] == tuple(labels):
        return logits
    what = describe_value(output if logits is None else logits)
    if len(labels) == 1:
        texts = logits is not None and logits.dim() == 3
        more = " (a language model is measured on token ids: an .npz archive with TASK.tokens)" if texts else ""
        raise CalibrationError(f"the head of {task} gives {what}; accuracy needs logits (batch, classes){more}")
    wanted = ", ".join(map(str, labels))
    raise CalibrationError(
        f"the head of {task} gives {what}; perplexity needs logits (batch, tokens, vocabulary), here [{wanted}, ...]"
    )
