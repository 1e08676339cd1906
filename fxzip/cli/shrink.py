"""``fxzip shrink``: make one checkpoint smaller."""

from __future__ import annotations

from typing import Any

import typer

from fxzip.cli import parameters as p
from fxzip.cli.merge import Merge
from fxzip.errors import OptionError
from fxzip.settings import EACH


def shrink_model(
    ctx: typer.Context,
    checkpoints: p.Checkpoint,
    data: p.Data,
    out: p.Out,
    model: p.Model = None,
    names: p.Names = None,
    model_args: p.ModelArgs = None,
    num_classes: p.Classes = None,
    ema: p.Ema = True,
    device: p.Device = "cpu",
    width: p.Width = None,
    budget: p.Budget = None,
    cut: p.Cut = None,
    method: p.Method = "select",
    alpha: p.Alpha = None,
    beta: p.Beta = None,
    options: p.Options = None,
    points: p.Points = "last",
    refit: p.Refit = True,
    hold_back: p.HoldBack = True,
    verify: p.Verify = True,
    ridge: p.Ridge = None,
    rounds: p.Rounds = None,
    images: p.Images = None,
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
    recipe: p.Recipe = None,
    quiet: p.Quiet = False,
    debug: p.Debug = False,
) -> None:
    """Make one network smaller, without training: fewer channels, and weights that are solved for.

    Also writes recipe.yaml, with every option that was used, beside the network.
    """
    _Shrink({param.name: ctx.params[param.name] for param in ctx.command.params if param.name in ctx.params}).run()


class _Shrink(Merge):
    """One run of the command."""

    command, least = "shrink", 1

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__({**given, "start": None, "heads": EACH})

    def _check_first(self) -> None:
        if self.width is None and self.given["budget"] is None:
            raise OptionError("give --width or --budget, as --budget 'flops<=0.5x'")
        if len(self.checkpoints) > 1:
            raise OptionError(f"{len(self.checkpoints)} checkpoints given: shrink takes one; zip merges several")
        super()._check_first()

    def _prepared(self, models: list[Any], batch: Any, names: tuple[str, ...]) -> Any:
        from fxzip.api import prepared_of

        return prepared_of(models, batch, names, self.given["verify"], self.labels)
