"""Checkpoint files: weights from .safetensors and .pth, whatever a training script has wrapped them in.

Nothing in a checkpoint can run code: PyTorch's files are read with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import pickle
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.errors import CheckpointError

State = dict[str, Tensor]
_DEPTH = 3
_SHOWN = 3


def read_checkpoint(path: str | PathLike[str], keys: Collection[str], *, ema: bool = True) -> State:
    """The state dict in a checkpoint file, under the names that a model has for it.

    It may lie inside other dicts (``{"state_dict": ..., "epoch": 3}``, ``{"model": ...}``), and its names may have a
    prefix (``module.``, ``_orig_mod.``, ``model.``): the place is taken that holds most of the model's names. What
    lies beside a prefix (a loss's own weights, an averaging's counter) is left out.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote.
        keys: The names in the model's state dict.
        ema: Of two places that fit equally well take the one that is called EMA; False: the other one.

    Raises:
        CheckpointError: The file is missing, cannot be read, or holds no tensors.
    """
    path = Path(path)
    places = [
        _Place(names, state, prefix, _fit(state, prefix, keys))
        for names, state in _states(_read(path))
        for prefix in _prefixes(state, keys)
    ]
    if not places:
        raise CheckpointError(f"{path} holds no weights: give a file with a model's state dict")
    best = max(places, key=lambda place: (place.fit, place.is_ema == ema, -len(place.prefix)))
    cut = len(best.prefix)
    return {name[cut:]: value for name, value in best.state.items() if name.startswith(best.prefix)}


def load_state(model: nn.Module, state: State, *, source: str, name: str) -> None:
    """Load a state dict into a model, which it must fit.

    Args:
        model: The model.
        state: Its weights.
        source: The checkpoint, as the user named it.
        name: The architecture, as the user named it.

    Raises:
        CheckpointError: Names are missing or unknown, or shapes are others; some of them are named.
    """
    own = model.state_dict()
    other = [
        f"{key} {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    fitting = {key: value for key, value in state.items() if key not in own or own[key].shape == value.shape}
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    missing = [key for key in missing if key not in state]
    found = (_some("missing", missing), _some("unknown to the model", unexpected), _some("of another shape", other))
    wrong = "; ".join(text for text in found if text)
    if wrong:
        raise CheckpointError(f"{source} does not fit {name}: {wrong}")


@dataclass(frozen=True)
class _Place:
    """Where in a checkpoint weights were found: the dicts' names, the dict, the prefix, and how many names fit."""

    names: tuple[str, ...]
    state: State
    prefix: str
    fit: int

    @property
    def is_ema(self) -> bool:
        return any("ema" in name.lower() for name in (*self.names, self.prefix))


def _read(path: Path) -> Any:
    if not path.is_file():
        what = "is a folder without a config.json" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the checkpoint {path} {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # timm's training script keeps its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        advice = "it holds more than tensors; save the weights alone: torch.save(model.state_dict(), path)"
        raise CheckpointError(f"{path} cannot be read without running code from it: {advice}") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read, it may be cut short: {type(error).__name__}: {error}") from error


def _states(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every dict with tensors in a checkpoint, with the names of the dicts around it."""
    if not isinstance(value, Mapping) or len(names) > _DEPTH:
        return
    state = {key: part for key, part in value.items() if isinstance(key, str) and isinstance(part, Tensor)}
    if state:
        yield names, state
    for key, part in value.items():
        yield from _states(part, (*names, str(key)))


def _prefixes(state: State, keys: Collection[str]) -> list[str]:
    """What stands before the model's names in a state dict: the commonest, and no prefix at all."""
    known = frozenset(keys)
    count: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for depth in range(1, min(_DEPTH + 1, len(parts))):
            if ".".join(parts[depth:]) in known:
                count[".".join(parts[:depth]) + "."] += 1
    return ["", *(prefix for prefix, _ in count.most_common(4))]


def _fit(state: State, prefix: str, keys: Collection[str]) -> int:
    return sum(prefix + key in state for key in keys)


def _some(what: str, names: list[str]) -> str:
    """``3 names missing (a, b, c)``, or nothing."""
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {'name' if len(names) == 1 else 'names'} {what} ({shown})"
