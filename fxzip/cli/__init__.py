"""The command line: `zip`, `shrink`, `sweep`, `inspect`, `eval`, `predict`, `export`, `draw`, `report`, `demo`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from fxzip.cli import demo, evaluate, inspection, merge, predict, serve, shrink, sweep
from fxzip.cli.errors import Group

app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False)


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


app.command("zip")(merge.zip_models)
app.command("shrink")(shrink.shrink_model)
app.command("sweep")(sweep.sweep_models)
app.command("inspect")(inspection.inspect_model)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(serve.export)
app.command("draw")(serve.draw)
app.command("report")(serve.report)
app.command("demo")(demo.demo)
