"""The command line: ``fxzip demo``."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxzip.errors import FxzipError, OptionError


class _Group(TyperGroup):
    """Says an `FxzipError` in one line on stderr and exits with 1; with ``--debug`` it is raised."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FxzipError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"fxzip: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxzip {version('fxzip')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Merge trained networks of one architecture into one, without training."""


@app.command()
def demo(
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="PATH", dir_okay=False, help="Write the table there, too."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show the table only, no progress.")] = False,
) -> None:
    """Train two small ResNets on digits 0-4 and 5-9, merge them, and print what the merges kept."""
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise OptionError(f"--json: the folder {json_path.resolve().parent} does not exist")
    from rich.console import Console

    from fxzip import demo as digits

    rows = digits.run(progress=not quiet)
    Console(width=max(Console().width, 90)).print(digits.table(rows))  # not a column less, even into a pipe
    if json_path is not None:
        json_path.write_text(json.dumps(digits.as_json(rows), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    app()
