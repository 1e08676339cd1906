"""``fxzip sweep``: many merges for one pass over the images."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.cli.derived import like_zip
from fxzip.cli.errors import warn
from fxzip.cli.merge import Merge
from fxzip.settings import AUTO, EACH

Cuts = Annotated[
    list[str] | None,
    typer.Option(
        "--cut",
        metavar="NAME",
        help="Where the heads begin, once for each that is tried: a module or a share of the layers; default: about "
        "eight, spread over the network.",
        rich_help_panel="Merging",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"How channels are matched, once for each that is tried; default: {AUTO}.",
        rich_help_panel="Merging",
    ),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw the curve: a picture in .svg, .png or .pdf.")
]
_OF_ONE_MERGE = ("out", "overwrite", "report", "labels", "cut", "start", "width", "budget", "heads", "stitch", "method")
_OF_ONE_METHOD = ("alpha", "beta", "options")


def sweep_models(ctx: typer.Context, **_given: Any) -> None:
    """Merge at many cuts and in many ways, and print how well each answers for what it costs.

    Each is measured by its agreement with the networks that are merged, in % of images that its fit did not see; no
    labels are needed. Nothing is saved: fxzip zip --cut NAME --method NAME saves the one that you choose.
    """
    _Sweep({param.name: ctx.params[param.name] for param in ctx.command.params if param.name in ctx.params}).run()


def _own(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


like_zip(
    sweep_models,
    without=(*_OF_ONE_MERGE, *_OF_ONE_METHOD, "hold_back"),
    more=(_own("cuts", Cuts), _own("methods", Methods), _own("plot", Plot), _own("json_path", p.JsonPath)),
)


class _Sweep(Merge):
    """One run of the command."""

    command = "sweep"

    def __init__(self, given: dict[str, Any]) -> None:
        none = dict.fromkeys((*_OF_ONE_MERGE, *_OF_ONE_METHOD))
        super().__init__({**none, **given, "hold_back": None, "heads": EACH, "method": AUTO})
        self.hold_back = True  # merges are measured on these images, also without refit
        self.methods = list(given["methods"] or (AUTO,))
        self.cuts = [shared.share_or_name(cut) for cut in given["cuts"] or ()]

    def _check_places(self) -> None:
        for method in self.methods:
            first.check_matching(method, {})
        if self.given["json_path"] is not None:
            first.check_writable(self.given["json_path"].absolute().parent)
        if self.given["plot"] is not None:
            first.check_suffix(self.given["plot"], (".svg", ".png", ".pdf"), "a plot")
            first.check_writable(self.given["plot"].absolute().parent)
            first.check_matplotlib("--plot")

    def run(self) -> None:
        """Check, load, merge in all ways, print."""
        prepared, loader, _ = self.observed()
        fixed = {"refit": self.refit if self.given["refit"] else False, "verify": self.given["verify"]}
        ways = [{"name": method, "method": method, **fixed} for method in self.methods]
        found = prepared.sweep(self.cuts or None, ways, progress=not self.quiet)
        typer.echo(str(found))
        if self.given["json_path"] is not None:
            shared.write_json(self.given["json_path"], asdict(found))
        if self.given["plot"] is not None:
            found.plot(self.given["plot"])
        if loader.skipped():
            warn(str(loader.skipped()))
