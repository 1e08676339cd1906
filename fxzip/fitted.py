"""`Fitted`: a merged network before it is handed out, and what its parts are taken as while it is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzip.data.bars import Shown
from fxzip.data.calibration import Images
from fxzip.fidelity import Fidelity
from fxzip.passes.compare import compare
from fxzip.passes.cut import MergePlan
from fxzip.passes.polish import polish
from fxzip.passes.split import Split
from fxzip.settings import RefitOptions

if TYPE_CHECKING:
    from fxzip.prepared import Prepared


@dataclass(frozen=True, eq=False)
class Fitted:
    """A merged network before it is handed out.

    Attributes:
        parts: Trunk and heads.
        refitted: How many layers were solved for.
        recalibrated: How many BatchNorms were reset.
        fidelity: How well it answers; None where no image was held back.
    """

    parts: Split
    refitted: int
    recalibrated: int
    fidelity: Fidelity | None


def polished(
    prepared: Prepared, parts: Split, plan: MergePlan, images: Images, refit: RefitOptions, progress: Shown
) -> None:
    """Polish what was fitted; it stays as it was where that is worse on the images held back."""
    modules = nn.ModuleList([parts.trunk, *parts.heads])
    before = compare(parts, plan, prepared.names, {}, prepared.held, 0)
    kept = [(p, p.detach().clone()) for p in modules.parameters()]
    polish(parts, plan, images.own, refit, progress)
    after = compare(parts, plan, prepared.names, {}, prepared.held, 0)
    if before is None or after is None or after.score > before.score:
        return
    if before.clearly_better_than(after):
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


class Whole(nn.Module):
    """Trunk and heads as one module."""

    def __init__(self, parts: Split) -> None:
        super().__init__()
        self.trunk, self.heads = parts.trunk, nn.ModuleList(parts.heads)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Run both; nothing is given back."""
        crossing = self.trunk(*args, **kwargs)
        for head in self.heads:
            head(*crossing)
