"""``fxzip zip``: merge checkpoints of one architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fxzip.cli import first
from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.cli.alike import labels_of_folders, prepared_alike, read_labels
from fxzip.cli.errors import warn
from fxzip.cli.stitch import stitch_models
from fxzip.errors import OptionError
from fxzip.settings import AUTO, EACH, EFFORTS, MATCHING, RefitOptions


def zip_models(
    ctx: typer.Context,
    checkpoints: p.Checkpoints,
    data: p.Data,
    out: p.Out,
    model: p.Model = None,
    names: p.Names = None,
    model_args: p.ModelArgs = None,
    num_classes: p.Classes = None,
    ema: p.Ema = True,
    device: p.Device = "cpu",
    cut: p.Cut = None,
    start: p.Start = None,
    width: p.Width = None,
    budget: p.Budget = None,
    heads: p.Heads = EACH,
    stitch: p.Stitch = False,
    method: p.Method = AUTO,
    alpha: p.Alpha = None,
    beta: p.Beta = None,
    options: p.Options = None,
    points: p.Points = "last",
    refit: p.Refit = True,
    hold_back: p.HoldBack = True,
    verify: p.Verify = True,
    effort: p.Effort = "default",
    ridge: p.Ridge = None,
    rounds: p.Rounds = None,
    polish: p.Polish = None,
    keep_norms: p.KeepNorms = False,
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
    labels: p.Labels = None,
    report: p.ReportPath = None,
    overwrite: p.Overwrite = False,
    resume: p.Resume = None,
    memory: p.Memory = None,
    stats_device: p.StatsDevice = None,
    recipe: p.Recipe = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Merge networks of one architecture into one with a shared trunk and a head for each.

    Also writes recipe.yaml, with every option that was used, beside the network. Several processes share the work under
    torchrun --nproc-per-node N --no-python fxzip zip ...
    """
    Merge({param.name: ctx.params[param.name] for param in ctx.command.params if param.name in ctx.params}).run()


class Merge:
    """One run of the command, from its options."""

    command, least = "zip", 2

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.quiet = bool(given["quiet"]) or not shared.leads()
        self.checkpoints = [str(path) for path in given["checkpoints"]]
        self.method = given["method"]
        named = {**{key: given[key] for key in MATCHING["zip"]}, **shared.pairs(given["options"], "--option")}
        self.options = {key: value for key, value in named.items() if value is not None}
        self.model_args = shared.pairs(given["model_args"], "--model-arg")
        self.cut, self.start = (shared.share_or_name(given[key]) for key in ("cut", "start"))
        self.width = shared.width(given["width"])
        self.hold_back = bool(given["hold_back"] and given["refit"])  # the paper's rule takes all images
        settings = {**{key: given[key] for key in (*shared.OF_REFIT, "keep_norms")}, "images": given["limit"]}
        own = {key: value for key, value in settings.items() if value is not None}
        self.refit = RefitOptions(**{**EFFORTS[given["effort"]], **own})

    def run(self) -> None:
        """Check, load, merge, save."""
        if self.given.get("stitch"):
            self._stitch()
            return
        prepared, loader, config = self.observed()
        given = self.given
        zipped = prepared.convert(
            cut=self.cut,
            start=self.start,
            width=self.width,
            budget=given["budget"],
            heads=given["heads"],
            method=self.method,
            refit=self.fitting,
            verify=given["verify"],
            progress=not self.quiet,
            **self.options,
        )
        for broken in prepared.processes.everywhere("broken images", loader.broken):
            loader.broken |= broken
        if shared.leads():
            self._finish(zipped, config, loader.skipped())
        prepared.journal.close()

    def observed(self) -> tuple[Any, Any, dict[str, Any]]:
        """Check, load, analyse, and run the models over the images.

        Returns:
            The models, prepared and observed; the images' loader; how images are prepared.
        """
        models, loader, config = self._loaded()
        given, names, journal = self.given, self.names, self._journal(models)
        from fxzip.memory import bounded

        with shared.spinner("tracing and analysing", self.quiet):
            batch = next(iter(loader))[0]
            prepared = self._prepared(models, batch, names)
            prepared.journal = journal
            prepared.place(self.cut, self.start, self.width, given["budget"])
            prepared.check_heads(given["heads"])
            self.fitting = bounded(prepared, self.memory, self.refit if given["refit"] else None) or False
        some = {key: given[key] for key in ("points", "stats_device")}
        prepared.observe(loader, hold_back=self.hold_back, progress=not self.quiet, **some)
        return prepared, loader, config

    def _stitch(self) -> None:
        """The same for networks that share nothing: one goes on from the other's features."""
        models, loader, config = self._loaded()
        zipped = stitch_models(models, loader, self, self.given)
        self._finish(zipped, config, loader.skipped())

    def _loaded(self) -> tuple[list[Any], Any, dict[str, Any]]:
        """Check, and load.

        Returns:
            The models; the images' loader; how images are prepared.
        """
        self._check_first()
        with shared.spinner("starting PyTorch", self.quiet):
            from fxzip.checks import task_names
            from fxzip.data.groups import find_images
            from fxzip.data.images import ImageLoader
            from fxzip.zoo import transform

        given = self.given
        names = self.names = self._check() or task_names(None, len(self.checkpoints))
        groups = find_images(given["data"])
        models, config, self.folded = prepared_alike(self._load(), names, given)
        loader = ImageLoader(
            groups.values(),
            transform(config),
            channels=config["input_size"][0],
            **{key: given[key] for key in ("batch_size", "limit", "seed", "strict", "workers")},
        )
        return models, loader, config

    def _finish(self, zipped: Any, config: dict[str, Any], skipped: str | None) -> None:
        """Save, and say what was done."""
        self._inform(zipped, config)
        self._save(zipped, config)
        if skipped:
            warn(skipped)
        if not self.quiet:
            typer.echo(f"{zipped.report}\nsaved to {self.given['out']}")

    def _journal(self, models: list[Any]) -> Any:
        """Where what is done is kept for the case of an interruption."""
        from fxzip.fingerprint import run_of
        from fxzip.journal import Journal
        from fxzip.processes import processes_of

        left = {*_NOT_KEPT, "stats_device", "checkpoints", "device", "workers"}
        settings = {key: value for key, value in self.given.items() if key not in left}
        return Journal.open(self.given["resume"], lambda: run_of(models, self.names, settings), processes_of())

    def _prepared(self, models: list[Any], batch: Any, names: tuple[str, ...]) -> Any:
        import fxzip
        from fxzip.checks import needs_linear

        options = {"verify": self.given["verify"], "linearise": needs_linear(self.method)}
        return fxzip.prepare(*models, example_inputs=batch, names=names, labels=self.labels, **options)

    def _inform(self, zipped: Any, config: dict[str, Any]) -> None:
        """Let what is known of images and classes travel with the network."""
        from dataclasses import replace

        from fxzip.information import Preparation

        labels = {**labels_of_folders(zipped, self.given["data"], self.names), **zipped.labels}
        zipped.information = replace(
            zipped.information, preparation=Preparation.of(config), labels=labels, folded=tuple(self.folded)
        )

    def _check_first(self) -> None:
        """Raise what can be known without PyTorch."""
        given = self.given
        self._check_places()
        self.models = first.models_of(given["model"], len(self.checkpoints), bool(given.get("stitch")))
        first.check_checkpoints(self.checkpoints, self.models, self.least)
        first.check_data(given["data"])
        first.check_matching(self.method, self.options)
        if given["names"] and len(given["names"]) != len(self.checkpoints):
            raise OptionError(f"names={given['names']}: give one name for each of the {len(self.checkpoints)} models")
        self.labels = read_labels(given["labels"])

    def _check_places(self) -> None:
        """Raise unless what is asked for can be written."""
        given = self.given
        first.check_output(given["out"], overwrite=given["overwrite"])
        if given["report"] is not None:
            first.check_page(given["report"])

    def _check(self) -> tuple[str, ...] | None:
        """Raise what can be known before the work; returns the tasks' names."""
        from fxzip.checks import check_method, check_widths, task_names
        from fxzip.joint import check_heads
        from fxzip.memory import parse_memory
        from fxzip.passes.cut import check_span

        given, count = self.given, len(self.checkpoints)
        self.memory = parse_memory(given["memory"])
        self.options = check_method(self.method, self.options, count)
        check_span(self.cut, self.start)
        check_heads(given["heads"])
        check_widths({"width": self.width, "budget": given["budget"], "cut": self.cut, "method": self.method})
        self.device = shared.device_named(given["device"])
        if given["names"]:
            return task_names(given["names"], count)
        try:
            return task_names(task_names_of(self.checkpoints), count)
        except OptionError:  # files of one name, in several folders
            return None

    def _load(self) -> list[Any]:
        from fxzip.data.loops import counted
        from fxzip.zoo import load

        models, given = [], self.given
        with counted(len(self.checkpoints), not self.quiet, "loading") as step:
            for name, path in zip(self.models, self.checkpoints, strict=True):
                model = load(name, path, num_classes=given["num_classes"], ema=given["ema"], **self.model_args)
                models.append(model.to(self.device))
                step()
        return models

    def _save(self, zipped: Any, config: dict[str, Any]) -> None:
        """The network, and beside it the recipe with everything that was chosen."""
        from fxzip.folders import new_folder
        from fxzip.recipe import NAME, write_recipe

        own = MATCHING["zip"]
        kept = {key: value for key, value in self.given.items() if key not in _NOT_KEPT}
        kept |= {key: config[key] for key in shared.PREPARATION}
        kept |= {"names": list(self.names), "model_args": self.model_args or None, "width": self.width}
        kept |= {key: getattr(self.refit, key) for key in shared.OF_REFIT}
        kept |= {"method": self.method, **{key: self.options.get(key) for key in own}}
        others = {key: value for key, value in self.options.items() if key not in own and value is not None}
        kept |= {"options": others or None}
        with new_folder(self.given["out"]) as fresh:
            zipped.save(fresh)
            write_recipe(fresh / NAME, kept, beside=self.given["out"], command=self.command)
        if self.given["report"] is not None:
            zipped.report.to_html(self.given["report"])


_NOT_KEPT = frozenset({"resume", "recipe", "debug", "quiet", "out", "overwrite", "report", "labels"})


def task_names_of(checkpoints: Sequence[str]) -> tuple[str, ...]:
    """The names of the files or repositories, without their endings."""
    last = (text.rstrip("/").rpartition("/")[2].rpartition(":")[2] for text in checkpoints)
    endings = {".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt"}
    found = []
    for name in last:
        while Path(name).suffix in endings:
            name = Path(name).stem
        found.append(name.replace(".", "_"))
    return tuple(found)
