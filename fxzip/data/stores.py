"""Tensors with some plain values beside them in one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.batches import Given
from fxzip.errors import FileFormatError, SaveError
from fxzip.plan.values import decode, encode

_VALUES = "fxzip"
_TENSOR = "fxzip.tensor"


def write_store(path: Path, tensors: Mapping[str, Tensor], values: Any) -> None:
    """Write tensors and plain values; an earlier file is replaced once this one is whole, also if the process dies.

    Raises:
        SaveError: Nothing can be written there.
    """
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(whole, part, {_VALUES: json.dumps(values)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path} cannot be written: {error}") from error


def read_store(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the values of a file.

    Raises:
        FileFormatError: There is none, or it is another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_VALUES)
            if text is None:
                raise FileFormatError(f"{path} was not written by fxzip for this")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(text)  # noqa: SIM118  no dict
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} cannot be read: {error}") from error


def packed(batches: Iterable[Given], into: dict[str, Tensor], name: str) -> list[Any]:
    """Batches as plain values, their tensors put ``into`` a dict under names that begin with ``name``."""
    found = []
    for number, batch in enumerate(batches):
        leaves, structure = pytree.tree_flatten(tuple(batch))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                into[f"{name}.{number}.{place}"] = leaf
                leaves[place] = {_TENSOR: f"{name}.{number}.{place}"}
        found.append(encode(pytree.tree_unflatten(leaves, structure)))
    return found


def unpacked(values: Iterable[Any], tensors: Mapping[str, Tensor]) -> list[Given]:
    """The batches that plain values and tensors stand for."""
    return [Given(*_filled(decode(value), tensors)) for value in values]


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A structure with its tensors in the places of their names."""
    if isinstance(value, dict):
        name = value.get(_TENSOR)
        return {key: _filled(part, tensors) for key, part in value.items()} if name is None else tensors[name]
    if isinstance(value, tuple | list):
        return type(value)(_filled(part, tensors) for part in value)
    return value
