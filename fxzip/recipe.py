"""Recipes: the options of a command as a YAML file, so that a merge can be repeated.

    model: timm:resnet50
    checkpoints: [dogs.safetensors, birds.safetensors]
    data: IMAGES/
    cut: layer3
    options: {gamma: 0.5}

The names are those of the command line's options, with ``_`` for ``-``; some of mergekit's are understood
(`fxzip.mergekit`). Paths are relative to the recipe's folder.
A recipe is read as plain YAML: no classes, no deep nesting, no anchors and aliases (a few lines can be gigabytes).
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
from fxzip.folders import read_regular
from fxzip.mergekit import translated

NAME = "recipe.yaml"
PATHS = frozenset({"checkpoints", "data", "json_path", "out", "plot", "report"})
"""The options that are paths, or may be."""

_EXPONENT = re.compile(r"[-+]?\d+e[-+]?\d+", re.IGNORECASE)
MOST_BYTES = 1 << 18
"""The largest recipe."""
DEEPEST = 16
"""The most lists and mappings inside each other."""

_LONGEST_NUMBER = 64
_REMOTE = "hf-hub:"
_LOCAL = "local-dir:"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without what grows while it is read."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One value.

        Raises:
            YAMLError: It is an alias, has an anchor, or lies too deep.
        """
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"anchors and aliases are not read: {_mark(event)}")
        if self.depth >= DEEPEST:
            raise yaml.YAMLError(f"it nests deeper than {DEEPEST} levels: {_mark(event)}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node.

        Raises:
            YAMLError: It is a number with too many digits.
        """
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value):,} digits: {_mark(node)}")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping.

        Raises:
            YAMLError: A key is given twice.
        """
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None) if len(names) > len({*names}) else None
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice: {_mark(node)}")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _mark(place: Any) -> str:
    return f"line {place.start_mark.line + 1}"


def read_recipe(path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The options in a recipe; those that are null are left out.

    Args:
        path: The file.
        known: The options that there are; None: any.

    Raises:
        OptionError: The file cannot be read, is no mapping, is larger or deeper than any recipe, or has an unknown
            option (near ones are named).
    """
    try:
        found = yaml.load(read_regular(path, MOST_BYTES).decode("utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the recipe {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, LookupError, RecursionError) as error:
        raise OptionError(f"the recipe {path} is not YAML of plain options: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"the recipe {path} holds no options: write lines like 'cut: layer3'")
    try:
        found = translated(found)
    except OptionError as error:
        raise OptionError(f"the recipe {path}: {error}") from error
    for name in found:
        if known is not None and name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=3) or sorted(known)
            raise OptionError(f"the recipe {path} has an unknown option {name!r}; did you mean {', '.join(near)}?")
    folder = path.resolve().parent
    return {
        name: _each(value, lambda text: _join(folder, text)) if name in PATHS else value
        for name, value in found.items()
        if value is not None
    }


def as_number(value: Any) -> Any:
    """A number like ``1e-3``, which YAML takes for a text, as a number; anything else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def write_recipe(path: Path, options: Mapping[str, Any], *, beside: Path | None = None, command: str = "zip") -> None:
    """Write a recipe.

    Args:
        path: The file.
        options: The options; None for what was not given.
        beside: The folder that paths are written relative to, where the file will lie later; default: its own.
        command: The command that they are of.
    """
    folder = (path.parent if beside is None else beside).resolve()
    values = {
        name: _each(value, lambda text: _relative(folder, text)) if name in PATHS else _plain(value)
        for name, value in options.items()
        if value is not None
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
    path.write_text(f"# Again: fxzip {command} --recipe {NAME} --out FOLDER\n{text}", encoding="utf-8")


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
