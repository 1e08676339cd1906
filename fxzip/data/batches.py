"""What a loader gives, turned into a model's inputs, and batches of another size or on another device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.errors import CalibrationError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Given(NamedTuple):
    """A batch whose inputs are known: lists of these are loaders, too."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_FEW = 4  # parts of a structure that are described one by one


def model_inputs(batch: object) -> Inputs:
    """The positional and keyword inputs that a loader's batch stands for.

    A tensor is the input; of a tuple or list the first element is, and the rest (labels) is left alone; a
    dict holds keyword inputs, all of which are passed.

    Raises:
        CalibrationError: The batch is anything else.
    """
    first = batch
    if isinstance(batch, Given):
        return batch.args, batch.kwargs
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise CalibrationError("the loader gave an empty tuple or list; its first element must be the input")
        first = batch[0]
    if isinstance(first, Tensor):
        return (first,), {}
    if isinstance(first, Mapping):
        return (), _keyword_inputs(first)
    where = "" if first is batch else f" whose first element is {_describe(first)}"
    if isinstance(first, np.ndarray):
        raise CalibrationError(
            f"the loader gave {describe_value(batch)}, not tensors: convert by torch.from_numpy(images)"
        )
    raise CalibrationError(
        f"the loader gave {_describe(batch)}{where}; a batch must be a tensor, a tuple or list whose first "
        "element is the input, or a dict of keyword inputs"
    )


def given_inputs(given: Any) -> Inputs:
    """The inputs that a user gives as an example: a tensor, a tuple or list of positional inputs, or a dict by keyword.

    Raises:
        CalibrationError: It is anything else.
    """
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else model_inputs(given)


def _keyword_inputs(batch: Mapping[Any, Any]) -> dict[str, Any]:
    if not batch:
        raise CalibrationError("the loader gave an empty dict; it must hold the model's keyword inputs")
    wrong = [key for key in batch if not isinstance(key, str)]
    if wrong:
        raise CalibrationError(
            f"the loader gave a dict with the key {wrong[0]!r}; its keys must name the model's inputs"
        )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(dict(batch))):
        array = any(isinstance(value, np.ndarray) for value in batch.values())
        hint = f"; convert its arrays by torch.from_numpy, {describe_value(batch)}" if array else ""
        raise CalibrationError(f"the loader gave a dict without a tensor: {sorted(batch)}{hint}")
    return dict(batch)


def describe_value(value: Any) -> str:
    """A value in a few words: the type and shape of a tensor or an array, the parts of a structure."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list) and 0 < len(value) <= _FEW:
        return f"({', '.join(map(describe_value, value))})"
    if isinstance(value, Mapping) and 0 < len(value) <= _FEW:
        return f"({', '.join(f'{key}={describe_value(part)}' for key, part in value.items())})"
    return type(value).__name__


def _describe(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def map_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed by a function; what is no tensor stays."""
    args, kwargs = inputs
    changed: Inputs = pytree.tree_map_only(Tensor, change, (tuple(args), dict(kwargs)))
    return changed


def to_device(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | str | None) -> Inputs:
    """The inputs with every tensor on ``device``; what is no tensor is left alone, and all of it if None."""
    if device is None:
        return tuple(args), dict(kwargs)
    return map_tensors((args, kwargs), lambda tensor: tensor.to(device))


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of samples: the size on axis 0 of the first tensor that has an axis.

    Raises:
        CalibrationError: There is no such tensor.
    """
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise CalibrationError("the inputs hold no tensor with a batch axis")


def with_batch_size(args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> Inputs:
    """The inputs with ``n`` samples: sliced, or repeated from the start, along axis 0.

    Only tensors whose axis 0 has the batch size change; all else (scalars, tables, flags) stays.

    Raises:
        CalibrationError: There is no tensor with a batch axis, the batch is empty, or ``n`` is less than 1.
    """
    size = batch_size(args, kwargs)
    if size < 1 or n < 1:
        raise CalibrationError(f"cannot make a batch of {n} samples of a batch of {size}")

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size or size == n:
            return tensor
        return tensor[:n] if n < size else torch.cat([tensor] * -(-n // size))[:n]

    return map_tensors((args, kwargs), resize)
