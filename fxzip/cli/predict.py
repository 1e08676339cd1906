"""``fxzip predict``: the classes of images, by their names."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.errors import OptionError


def predict(
    folder: p.Network,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One image or more.")],
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Ask this task only; may be repeated; default: all.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    device: p.Device = "cpu",
    json_path: p.JsonPath = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Name what is in images: the likeliest classes of each task, and their probabilities in %."""
    first.check_network(folder)
    missing = next((path for path in images if not path.is_file()), None)
    if missing is not None:
        raise OptionError(f"there is no image {missing}")
    if json_path is not None:
        first.check_writable(json_path.absolute().parent)
    import fxzip

    zipped = fxzip.load(str(folder), device=shared.device_named(device))
    rows = []
    for path in images:
        for name, found in zipped.predict(path, task=task, top=top).items():
            rows.append({"image": str(path), "task": name, "classes": [asdict(each) for each in found]})
            shown = ", ".join(f"{each.label} {each.score:.1%}" for each in found)
            typer.echo(f"{path}  {name}: {shown}")
    if json_path is not None:
        shared.write_json(json_path, {"rows": rows})
