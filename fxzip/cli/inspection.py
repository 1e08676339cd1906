"""``fxzip inspect``: what can be merged in an architecture, or was merged in a saved network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.folders import PLAN

if TYPE_CHECKING:
    from fxzip.channels import ChannelSpec


def inspect_model(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="timm:NAME, torchvision:NAME, local-dir:FOLDER, hf-hub:REPO, or a saved network",
    )],
    checkpoint: Annotated[str | None, typer.Argument(metavar="CHECKPOINT", help="Its weights (optional).")] = None,
    input_size: p.InputSize = None,
    model_args: p.ModelArgs = None,
    json_path: p.JsonPath = None,
    recipe: p.Recipe = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:  # fmt: skip
    """Show a network's channel spaces, what is kept in place and why, and where it can be cut."""
    if json_path is not None:
        first.check_writable(json_path.absolute().parent)
    if (Path(model) / PLAN).is_file():
        text, values = _saved(Path(model))
    else:
        with shared.spinner(f"tracing and analysing {model}", quiet):
            text, values = _analysed(model, checkpoint, input_size, shared.pairs(model_args, "--model-arg"))
    typer.echo(text)
    if json_path is not None:
        shared.write_json(json_path, values)


def _saved(folder: Path) -> tuple[str, Any]:
    """A saved network's report."""
    import fxzip
    from fxzip.plan import write_record

    report = fxzip.load(str(folder)).report
    return str(report), write_record(report)


def _analysed(name: str, checkpoint: str | None, size: Any, model_args: dict[str, Any]) -> tuple[str, Any]:
    """The spaces of an architecture, and the cuts of two of its kind."""
    import torch

    import fxzip
    from fxzip.passes.linearity import linearity
    from fxzip.zoo import data_config, load

    model = load(name, checkpoint, **model_args)
    shape = data_config(model, input_size=size)["input_size"]
    prepared = fxzip.prepare(model, model, example_inputs=torch.randn(2, *shape))
    spec = linearity(prepared.alignment.modules[0], prepared.spec)
    text = f"{spec}\n{len(prepared.cuts)} valid cuts: {', '.join(prepared.cuts)}"
    return text, {**_values(spec), "input_size": list(shape), "cuts": list(prepared.cuts)}


def _values(spec: ChannelSpec) -> dict[str, Any]:
    return {
        "coverage": spec.coverage,
        "spaces": [
            {"name": s.name, "size": s.size, "parent": s.parent, "sites": [repr(site) for site in s.sites]}
            for s in spec.spaces
        ],
        "frozen": [{"name": f.name, "size": f.size, "reason": f.reason} for f in spec.frozen],
    }
