"""``fxzip export``, ``fxzip draw`` and ``fxzip report``: a merged network for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.errors import OptionError


def export(
    folder: p.Network,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file that ends in .onnx or .pt2 (torch.export).")],
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Export this task's head only; default: all heads.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set version; default: the one that PyTorch chooses.")
    ] = None,
    recipe: p.Recipe = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Export a merged network to ONNX or torch.export, and check the file against it."""
    first.check_network(folder)
    first.check_suffix(path, (".onnx", ".pt2"), "an export")
    first.check_writable(path.absolute().parent)
    import fxzip

    zipped = fxzip.load(str(folder))
    with shared.spinner(f"exporting and checking {path.name}", quiet):
        done = zipped.export(path, task=task, opset=opset)
    typer.echo(str(done))


def draw(
    folder: p.Network,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A picture: .svg, .png, .pdf, .dot or .mmd (Mermaid).")],
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Draw a merged network: trunk, heads, and what is shared.

    An .svg is drawn by Graphviz where it is installed; .png, .pdf and .dot need it; Mermaid text needs nothing.
    """
    from fxzip.views.drawable import PICTURES, TEXTS, lacking

    first.check_network(folder)
    first.check_suffix(path, (*PICTURES, *TEXTS), "a drawing")
    first.check_writable(path.absolute().parent)
    why = lacking(path.suffix.lower())
    if why is not None:
        raise OptionError(f"{path.name} cannot be drawn: {why}; {path.with_suffix('.mmd').name} is Mermaid text")
    import fxzip

    fxzip.load(str(folder)).draw(path)
    if not quiet:
        typer.echo(str(path))


def report(
    folder: p.Network,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The page, a file that ends in .html.")],
    sweep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What fxzip sweep --json wrote: its curve is shown, too.")
    ] = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Write a merged network's report as one HTML page: what was merged, how well, and what it costs."""
    first.check_network(folder)
    first.check_page(path)
    curve = None if sweep is None else shared.read_json(sweep)
    import fxzip
    from fxzip.plan import read_record

    found = fxzip.load(str(folder)).report
    found.to_html(path, sweep=None if curve is None else read_record(fxzip.Sweep, curve))
    if not quiet:
        typer.echo(str(path))
