"""What a model gives, and how far two outputs differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxzip.data.batches import given_inputs
from fxzip.errors import OptionError
from fxzip.exported import tensors_in


def difference(expected: Any, actual: Any) -> float:
    """The largest difference of two outputs, as a share of the expected one's standard deviation.

    Args:
        expected: A tensor, or tensors in tuples, lists and dicts.
        actual: Such outputs to compare with them.

    Returns:
        The difference; infinite where only one of two numbers is finite, or neither is a number.

    Raises:
        OptionError: The outputs hold no tensors, or differ in their number or in a shape.
    """
    before, after = tensors_in(expected), tensors_in(actual)
    if not before or len(before) != len(after):
        raise OptionError(f"cannot compare outputs of {len(before)} and {len(after)} tensors")
    return max(map(_share, before, after))


def _share(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        raise OptionError(f"cannot compare outputs of shapes {tuple(expected.shape)} and {tuple(actual.shape)}")
    if not expected.numel():
        return 0.0
    precise = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.detach().to(precise), actual.detach().to(precise)
    error = float((a - b).abs().masked_fill(a == b, 0).nan_to_num(torch.inf).max())
    known = a[a.isfinite()]
    scale = float(known.std(correction=0)) if known.numel() else 0.0
    return error / (scale or float(known.abs().sum()) or 1.0)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model without gradients on a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    args, kwargs = given_inputs(inputs)
    with torch.no_grad():
        return model(*args, **kwargs)


def in_type(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with every floating point number in a type."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
