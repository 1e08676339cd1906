"""``fxzip eval``: the accuracy of a merged network on labelled images, or its perplexity on token ids."""

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

    Images are prepared as the recipe beside the network says. Language models are measured on token ids: perplexity,
    and how often the next token is the likeliest.
    """
    first.check_network(folder)
    first.check_data(data)
    if json_path is not None:
        first.check_writable(json_path.absolute().parent)
    import fxzip
    from fxzip.accuracy import measure, table

    place = shared.device_named(device)
    zipped = fxzip.load(str(folder), device=place)
    for name in task or ():
        zipped.head(name)
    tasks = tuple(task or zipped.names)
    saved = {**zipped.information.preparation.config, **_saved_recipe(folder)}
    loaders, classes = _loaders(zipped, data, tasks, saved, ctx.params)
    paths = _checkpoints(zipped.names, saved) if originals else {}
    rows = [measure(zipped, loaders, classes, progress=not quiet)]
    rows += _measure_originals(paths, loaders, saved, place, quiet, zipped.information.folded)
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
    zipped: Any, data: Path, tasks: tuple[str, ...], saved: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By task: a loader of its images, or of its token ids, and the names of its classes, where the data have them."""
    from fxzip.data.groups import find_images
    from fxzip.data.tokens import find_tokens

    tokens = find_tokens(data)
    if tokens:
        return _token_loaders(zipped, _own(tokens, tasks, data, "token ids"), given), {}
    groups = _own(find_images(data, labelled=True), tasks, data, "images")
    return _image_loaders(groups, saved, given), {name: group.classes for name, group in groups.items()}


def _own(groups: Mapping[str, Any], tasks: tuple[str, ...], data: Path, what: str) -> dict[str, Any]:
    """The group of each task; one without a name is that of the only task."""
    if len(tasks) == 1 and list(groups) == [""]:
        return {tasks[0]: groups[""]}
    missing = [name for name in tasks if name not in groups]
    if missing:
        found = ", ".join(repr(name) for name in groups)
        raise OptionError(
            f"{data} has no {what} of the task {missing[0]!r}: it has {found}; choose the tasks to measure by --task"
        )
    return {name: groups[name] for name in tasks}


def _token_loaders(zipped: Any, groups: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A loader of token ids for each task."""
    from fxzip.data.images import shuffled
    from fxzip.data.tokens import TokenBatches

    useless = next((key for key in shared.PREPARATION if given[key] is not None), None)
    if useless is not None:
        raise OptionError(
            f"--{useless.replace('_', '-')} says how images are prepared, and {given['data']} has token ids"
        )
    limit = given["limit"]
    chosen = {
        name: tokens.some(shuffled(len(tokens), None if limit is None else given["seed"])[:limit])
        for name, tokens in groups.items()
    }
    return {
        name: TokenBatches(zipped, name, tokens.ids, tokens.mask, batch_size=given["batch_size"])
        for name, tokens in chosen.items()
    }


def _image_loaders(groups: Mapping[str, Any], saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A loader of images for each task."""
    from fxzip.data.images import ImageLoader
    from fxzip.zoo import transform

    config = {key: saved[key] for key in shared.PREPARATION if key in saved}
    config |= {key: given[key] for key in shared.PREPARATION if given[key] is not None}
    files = not all(group.prepared for group in groups.values())
    lacking = [key for key in shared.PREPARATION[:3] if key not in config]
    if files and lacking:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in lacking)
        raise OptionError(f"neither the network nor a recipe says how images are prepared: give {names}, or --recipe")
    return {
        name: ImageLoader(
            [group],
            transform(config) if files else _unused,
            channels=config["input_size"][0] if files else 3,
            batch_size=given["batch_size"],
            limit=given["limit"],
            seed=None if given["limit"] is None else given["seed"],
            strict=given["strict"],
            workers=given["workers"],
        )
        for name, group in groups.items()
    }


def _unused(image: Any) -> Any:
    raise AssertionError(f"{image} was prepared before")


def _checkpoints(names: tuple[str, ...], saved: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoint of each network that was merged.

    Raises:
        OptionError: No recipe says which.
    """
    paths = saved.get("checkpoints", ())
    if len(paths) != len(names):
        raise OptionError("--originals: no recipe beside the network names the checkpoints")
    return dict(zip(names, paths, strict=True))


def _measure_originals(
    paths: Mapping[str, str], loaders: Mapping[str, Any], saved: Mapping[str, Any], device: Any, quiet: bool,
    folded: tuple[str, ...],
) -> list[Any]:  # fmt: skip
    """A row for each network that was merged."""
    from fxzip.accuracy import measure_one
    from fxzip.zoo import load

    rows = []
    for name, path in paths.items():
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
