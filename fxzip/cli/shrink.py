"""``fxzip shrink``: make one checkpoint smaller."""

from __future__ import annotations

from typing import Any

import typer

from fxzip.cli import parameters as p
from fxzip.cli.derived import like_zip
from fxzip.cli.merge import Merge
from fxzip.errors import OptionError
from fxzip.settings import EACH


def shrink_model(ctx: typer.Context, **_given: Any) -> None:
    """Make one network smaller, without training: fewer channels, and weights that are solved for.

    Also writes recipe.yaml, with every option that was used, beside the network.
    """
    _Shrink({param.name: ctx.params[param.name] for param in ctx.command.params if param.name in ctx.params}).run()


like_zip(
    shrink_model,
    without=("start", "heads", "stitch"),
    other={
        "checkpoints": lambda own: own.replace(annotation=p.Checkpoint),
        "method": lambda own: own.replace(default="select"),
    },
)


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
        from fxzip.checks import needs_linear
        from fxzip.preparing import prepared_of
        from fxzip.processes import processes_of

        linear = needs_linear(self.method)
        return prepared_of(models, batch, names, self.given["verify"], self.labels, processes_of(), linear)
