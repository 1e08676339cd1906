"""Example inputs as shapes and dtypes, and made-up inputs from them: no data of the user's goes to a file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs
from fxzip.errors import FileFormatError
from fxzip.plan.values import decode, encode

_LARGEST = 1 << 27
"""The most elements of all inputs together: a gigabyte of the largest type."""


def write_example(example: Inputs | None) -> Any:
    """The shapes, dtypes and (of integers) ranges of example inputs; what is no tensor stands for itself.

    Raises:
        SaveError: An input is neither a tensor nor a plain value.
    """
    if example is None:
        return None
    leaves, spec = pytree.tree_flatten(example)
    described = [_describe(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return encode(pytree.tree_unflatten(described, spec))


def _describe(tensor: Tensor) -> dict[str, Any]:
    entry = {"fxzip.shape": tuple(tensor.shape), "dtype": tensor.dtype}
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool
    if whole and tensor.numel():
        entry["range"] = (int(tensor.min()), int(tensor.max()))
    return entry


def read_example(entry: Any) -> Inputs | None:
    """Inputs of the same shapes: random numbers, or integers that run through the range; always the same.

    Raises:
        FileFormatError: It is no description of inputs.
    """
    if entry is None:
        return None
    example = _Maker().made(decode(entry))
    if not (isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple)):
        raise FileFormatError("the example is not a pair of inputs and keyword inputs")
    args, kwargs = example
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise FileFormatError("the example's keyword inputs have no names")
    return args, kwargs


class _Maker:
    """Makes inputs up, of a bounded number of elements in total."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._left = _LARGEST

    def made(self, value: Any) -> Any:
        """A structure in which every description is a tensor."""
        if isinstance(value, dict) and "fxzip.shape" in value:
            return self._tensor(value["fxzip.shape"], value.get("dtype"), value.get("range", (0, 0)))
        if isinstance(value, dict):
            return {key: self.made(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.made(part) for part in value)
        return value

    def _tensor(self, shape: Any, dtype: Any, limits: Any) -> Tensor:
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or not isinstance(dtype, torch.dtype):
            raise FileFormatError(f"an example input cannot have shape {shape!r} and type {dtype!r}")
        self._left -= math.prod(shape)
        if self._left < 0:
            raise FileFormatError(f"the example inputs have more than {_LARGEST:,} elements")
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=self._generator, dtype=torch.float32).to(dtype)
        if not (isinstance(limits, tuple) and len(limits) == 2 and all(type(limit) is int for limit in limits)):
            raise FileFormatError(f"an example input cannot have the range {limits!r}")
        low, high = limits
        whole: Tensor = torch.arange(math.prod(shape)).reshape(shape) % (max(high - low, 0) + 1) + low
        return whole.to(dtype)
