"""Recipes: the options of a command as a YAML file, so that a merge can be repeated.

    model: timm:resnet50
    checkpoints: [dogs.safetensors, birds.safetensors]
    data: IMAGES/
    cut: layer3
    options: {gamma: 0.5}

The names are those of the command line's options, with ``_`` for ``-``. Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from fxzip.errors import OptionError

NAME = "recipe.yaml"
PATHS = frozenset({"checkpoints", "data", "json_path", "out"})
"""The options that are paths, or may be."""

_EXPONENT = re.compile(r"[-+]?\d+e[-+]?\d+", re.IGNORECASE)
_REMOTE = "hf-hub:"
_LOCAL = "local-dir:"


def read_recipe(path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The options in a recipe; those that are null are left out.

    Args:
        path: The file.
        known: The options that there are; None: any.

    Raises:
        OptionError: The file cannot be read, is no mapping, or has an unknown option (near ones are named).
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise OptionError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"the recipe {path} holds no options: write lines like 'cut: layer3'")
    for name in found:
        if known is not None and name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=3) or sorted(known)
            raise OptionError(f"the recipe {path} has an unknown option {name!r}; near: {', '.join(near)}")
    folder = path.resolve().parent
    return {
        name: _each(value, lambda text: _join(folder, text)) if name in PATHS else value
        for name, value in found.items()
        if value is not None
    }


def as_number(value: Any) -> Any:
    """A number like ``1e-3``, which YAML takes for a text, as a number; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def write_recipe(path: Path, options: Mapping[str, Any], *, beside: Path | None = None) -> None:
    """Write a recipe.

    Args:
        path: The file.
        options: The options; None for what was not given.
        beside: The folder that paths are written relative to, where the file will lie later; default: its own.
    """
    folder = (path.parent if beside is None else beside).resolve()
    values = {
        name: _each(value, lambda text: _relative(folder, text)) if name in PATHS else _plain(value)
        for name, value in options.items()
        if value is not None
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
    path.write_text(f"# Again: fxzip zip --recipe {NAME} --out FOLDER\n{text}", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A path changed, or each of a list."""
    return [change(str(part)) for part in value] if isinstance(value, (list, tuple)) else change(str(value))


def _join(folder: Path, text: str) -> str:
    if text.startswith(_REMOTE):
        return text
    if text.startswith(_LOCAL):
        return _LOCAL + str(folder / text.removeprefix(_LOCAL))
    return str(folder / text)


def _relative(folder: Path, text: str) -> str:
    if text.startswith(_REMOTE):
        return text
    if text.startswith(_LOCAL):
        return _LOCAL + _relative(folder, text.removeprefix(_LOCAL))
    parent, name = os.path.split(os.path.abspath(text))
    return os.path.relpath(os.path.join(os.path.realpath(parent), name), folder)  # a link keeps its own name
