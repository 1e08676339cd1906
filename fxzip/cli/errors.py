"""Errors and warnings in one line each; tracebacks with ``--debug`` only."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from fxzip.errors import DroppedInputWarning, FewImagesWarning, FrozenSpaceWarning, FxzipError, PixelWarning
from fxzip.stopping import SAID, STOPPED


class Group(TyperGroup):
    """The group of commands: it reports what goes wrong in any of them.

    1. An `FxzipError` and anything unexpected: one line on stderr, exit status 1.
    2. A wrong use of the command line: one line on stderr, exit status 2.
    3. Ctrl-C: one line on stderr, exit status 130.
    4. With ``--debug`` 1 is raised instead.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the group's own options; without any argument the help is shown."""
        if not args:
            return super().parse_args(ctx, args)
        with _reported(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _reported(ctx), warnings.catch_warnings():
            if not ctx.params.get("debug"):
                warnings.simplefilter("ignore")  # other libraries' talk
            for kind in (FrozenSpaceWarning, FewImagesWarning, DroppedInputWarning, PixelWarning):
                warnings.simplefilter("always", kind)
            warnings.showwarning = _show_warning
            with _debugged(ctx):
                return super().invoke(ctx)


def warn(text: str) -> None:
    """Say something on stderr, in one line."""
    typer.echo(f"fxzip: warning: {_one_line(text)}", err=True)


@contextmanager
def _reported(ctx: Any) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        typer.echo(SAID, err=True)
        raise typer.Exit(STOPPED) from None
    except typer.TyperException as error:
        hint = f" (see {ctx.command_path} --help)" if error.exit_code == 2 else ""
        _fail(f"{_one_line(error.format_message())}{hint}", error.exit_code)
    except Exception as error:
        if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
            raise
        if isinstance(error, FxzipError):
            _fail(_one_line(str(error)), 1)
        _fail(f"{type(error).__name__}: {_one_line(str(error))} (fxzip --debug ... shows where)", 1)


@contextmanager
def _debugged(ctx: Any) -> Iterator[None]:
    """With ``--debug``, which may come with the command, show what is logged: torch's dumps."""
    logger, handler = logging.getLogger("fxzip"), logging.StreamHandler()
    handler.addFilter(lambda _: bool(ctx.params.get("debug")))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _fail(text: str, status: int) -> None:
    typer.echo(f"fxzip: error: {text}", err=True)
    raise typer.Exit(status) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    warn(str(message))
