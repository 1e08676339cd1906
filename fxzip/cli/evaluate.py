"""``fxzip eval``: the accuracy of a merged network on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.cli.errors import warn
from fxzip.errors import OptionError


def evaluate(
    ctx: typer.Context,
    folder: p.Network,
    data: p.LabelledData,
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Measure this task only; may be repeated; default: all.")
    ] = None,
    originals: Annotated[bool, typer.Option("--originals", help="Also measure the networks that were merged.")] = False,
    device: p.Device = "cpu",
    limit: p.Limit = None,
    seed: p.Seed = 0,
    batch_size: p.BatchSize = 32,
    workers: p.Workers = 0,
    strict: p.Strict = False,
    input_size: p.InputSize = None,
    mean: p.Mean = None,
    std: p.Std = None,
    interpolation: p.Interpolation = None,
    crop_pct: p.CropPct = None,
    crop_mode: p.CropMode = None,
    json_path: p.JsonPath = None,
    recipe: p.Recipe = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Measure accuracy: each head on its task's images, and all heads against each other (joint).

    Images are prepared as the recipe beside the network says.
    """
    first.check_network(folder)
    first.check_data(data)
    if json_path is not None:
        first.check_writable(json_path.absolute().parent)
    import fxzip
    from fxzip.accuracy import measure, table
    from fxzip.data.groups import find_images

    place = shared.device_named(device)
    zipped = fxzip.load(str(folder), device=place)
    for name in task or ():
        zipped.head(name)
    tasks = tuple(task or zipped.names)
    saved = {**zipped.information.preparation.config, **_saved_recipe(folder)}
    groups = find_images(data, labelled=True)
    loaders = _loaders(groups, tasks, saved, ctx.params, str(data))
    classes = {name: groups[name].classes for name in tasks}
    rows = [measure(zipped, loaders, classes, progress=not quiet)]
    if originals:
        rows += _measure_originals(zipped.names, loaders, saved, place, quiet, zipped.information.folded)
    for name, loader in loaders.items():
        if loader.skipped():
            warn(f"{name}: {loader.skipped()}")
    typer.echo(table(rows, tasks))
    if json_path is not None:
        shared.write_json(json_path, {"rows": [asdict(row) for row in rows]})


def _saved_recipe(folder: Path) -> dict[str, Any]:
    """The recipe beside a network; empty where there is none."""
    from fxzip.recipe import NAME, read_recipe

    return read_recipe(folder / NAME) if (folder / NAME).is_file() else {}


def _loaders(
    groups: Mapping[str, Any], tasks: tuple[str, ...], saved: Mapping[str, Any], given: Mapping[str, Any], data: str
) -> dict[str, Any]:
    """A loader for each task."""
    from fxzip.data.images import ImageLoader
    from fxzip.zoo import transform

    missing = [name for name in tasks if name not in groups]
    if missing:
        found = ", ".join(repr(name) for name in groups)
        raise OptionError(
            f"{data} has no images of the task {missing[0]!r}: it has {found}; choose the tasks to measure by --task"
        )
    config = {key: saved[key] for key in shared.PREPARATION if key in saved}
    config |= {key: given[key] for key in shared.PREPARATION if given[key] is not None}
    files = not all(groups[name].prepared for name in tasks)
    lacking = [key for key in shared.PREPARATION[:3] if key not in config]
    if files and lacking:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in lacking)
        raise OptionError(f"neither the network nor a recipe says how images are prepared: give {names}, or --recipe")
    return {
        name: ImageLoader(
            [groups[name]],
            transform(config) if files else _unused,
            channels=config["input_size"][0] if files else 3,
            batch_size=given["batch_size"],
            limit=given["limit"],
            seed=None if given["limit"] is None else given["seed"],
            strict=given["strict"],
            workers=given["workers"],
        )
        for name in tasks
    }


def _unused(image: Any) -> Any:
    raise AssertionError(f"{image} was prepared before")


def _measure_originals(
    names: tuple[str, ...], loaders: Mapping[str, Any], saved: Mapping[str, Any], device: Any, quiet: bool,
    folded: tuple[str, ...],
) -> list[Any]:  # fmt: skip
    """A row for each network that was merged."""
    from fxzip.accuracy import measure_one
    from fxzip.zoo import load

    paths = saved.get("checkpoints", ())
    if len(paths) != len(names):
        raise OptionError("--originals: no recipe beside the network names the checkpoints")
    rows = []
    for name, path in zip(names, paths, strict=True):
        if name in loaders:
            model = load(
                saved.get("model"), path, num_classes=saved.get("num_classes"), ema=saved.get("ema", True),
                **(saved.get("model_args") or {}),
            )  # fmt: skip
            if name in folded:
                model = _renormalised(model, saved)
            rows.append(measure_one(name, model.to(device), loaders[name], progress=not quiet))
    return rows


def _renormalised(model: Any, saved: Mapping[str, Any]) -> Any:
    """A model that takes images prepared as the recipe says, as it was merged."""
    from fxzip.renormalising import renormalise
    from fxzip.zoo import data_config

    own = data_config(model)
    return renormalise(model, own["mean"], own["std"], saved["mean"], saved["std"])
