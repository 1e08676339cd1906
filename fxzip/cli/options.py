"""What commands share: how options are read, recipes, places to write to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, get_type_hints

import typer
import yaml

from fxzip.errors import OptionError
from fxzip.folders import read_regular, write_file
from fxzip.recipe import MOST_BYTES, as_number, read_recipe
from fxzip.settings import MATCHING, refit_settings

OF_REFIT = ("ridge", "rounds", "polish")
"""The settings of refit that are options of a command."""
DECLARED = {name: refit_settings()[name] for name in OF_REFIT} | dict(MATCHING["zip"])
"""The options of commands that are settings of refit or of the method zip."""
PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""The options that say how images are prepared; the names are timm's."""


def numbers(text: Any) -> tuple[float, ...]:
    """Numbers separated by commas, or a list of a recipe."""
    parts = text.split(",") if isinstance(text, str) else text if isinstance(text, (list, tuple)) else [text]
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise typer.BadParameter(f"{text!r}: give numbers with commas between them") from None


def input_size(text: Any) -> tuple[int, ...]:
    """``3,224,224``, or ``224`` for coloured images."""
    found = numbers(text)
    if len(found) == 1:
        found = (3, found[0], found[0])
    if len(found) != 3 or any(size < 1 or size != int(size) for size in found) or found[0] not in (1, 3):
        raise typer.BadParameter(f"{text!r}: give channels (1 or 3), height and width, like 3,224,224")
    return tuple(int(size) for size in found)


def pairs(given: list[str] | None, option: str) -> dict[str, Any]:
    """``NAME=VALUE`` options; the values are read as YAML: numbers, true, null, [7, 7]."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"{option} {text}: write NAME=VALUE")
        try:
            found[name] = as_number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise OptionError(f"{option} {text}: {value!r} cannot be read: {error}") from error
    return found


def width(given: list[str] | None) -> float | dict[str, float] | None:
    """A width: one factor, or one for each of some modules, as ``NAME=FACTOR``."""
    found: dict[str, float] = {}
    for text in given or ():
        name, equals, factor = text.rpartition("=")
        try:
            found[name if equals else ""] = float(yaml.safe_load(factor))  # as values of a recipe come
        except (TypeError, ValueError, yaml.YAMLError):
            raise OptionError(f"--width {text}: write a factor like 1.15, or NAME=FACTOR") from None
    if "" in found and len(found) > 1:
        raise OptionError("--width: give one factor, or NAME=FACTOR for each of some modules")
    return found.get("", found or None)


def share_or_name(cut: str | None) -> str | float | None:
    """A cut: a number with a point is a share of the layers, all else a name."""
    return float(cut) if cut is not None and re.fullmatch(r"\d*\.\d*", cut) and cut != "." else cut


def read_options(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take a recipe's options as the defaults of a command's."""
    if path is None or ctx.resilient_parsing:
        return path
    commands: Mapping[str, Any] = ctx.find_root().command.commands  # type: ignore[attr-defined]
    names = {p.name for command in commands.values() for p in command.params}
    values = read_recipe(path, names - {"recipe", "debug", "help"})
    kinds = get_type_hints(ctx.command.callback)
    ctx.default_map = {name: _as_given(name, kinds[name], value) for name, value in values.items() if name in kinds}
    return path


_KINDS = ((bool, bool, "true or false"), (int, int, "a whole number"), (float, Real, "a number"))
"""What a recipe must hold where an option is a bool, an int or a float: the type, and its name."""


def _as_given(name: str, wanted: Any, value: Any) -> Any:
    """A value of a recipe in the form that an option takes: a mapping is a list of ``NAME=VALUE``.

    Raises:
        OptionError: It is of another kind than the option. (The command line would make 1 of true and of 1.5.)
    """
    if name in DECLARED:
        return DECLARED[name].check(name, as_number(value))
    for option, kind, words in _KINDS:
        fits = isinstance(value, kind) and (option is bool or not isinstance(value, bool))
        if wanted in (option, option | None) and not fits:
            raise OptionError(f"{name}={value!r}: it must be {words}")
    if wanted == list[str] | None and isinstance(value, Real) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, dict):
        return [f"{name}={yaml.safe_dump(part, default_flow_style=True).strip()}" for name, part in value.items()]
    return value


def set_debug(ctx: typer.Context, wanted: bool) -> bool:
    """``--debug`` after the command means what it means before it."""
    if wanted:
        ctx.find_root().params["debug"] = True
    return wanted


def write_json(path: Path, values: Any) -> None:
    """Write plain values as JSON."""
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Plain values from a file of JSON.

    Raises:
        OptionError: It cannot be read.
    """
    try:
        return json.loads(read_regular(path, MOST_BYTES))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error


@contextmanager
def spinner(text: str, quiet: bool) -> Iterator[None]:
    """A sign of life on stderr, for work whose length is not known."""
    from rich.console import Console

    if quiet:
        yield
        return
    with Console(stderr=True).status(text):
        yield


def leads() -> bool:
    """Whether this process writes and shows what is made: of several that torchrun started the first one."""
    return os.environ.get("RANK", "0") == "0"


def device_named(text: str) -> Any:
    """The device of a name; of several processes on one machine each gets its own of the name ``cuda``.

    Raises:
        OptionError: There is no such device here.
    """
    import torch

    try:
        device = torch.device(text)
        if text == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).add_(1)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device {text}: {str(error).splitlines()[0]}") from error
