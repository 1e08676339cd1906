"""The ways to merge that are compared, and one merge with what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

import fxzip
from benchmarks.lib.machine import timed
from benchmarks.lib.runs import Row

METHODS: dict[str, dict[str, Any]] = {
    "average": {"method": "average", "refit": False},
    "Git Re-Basin (weights)": {"method": "weights", "refit": False},
    "permute": {"method": "permute", "refit": False},
    "MuDSC (dual)": {"method": "dual", "refit": False},
    "CCA-Merge": {"method": "cca", "refit": False},
    "ZipIt!": {"method": "zip", "refit": False, "alpha": 1e-4, "beta": 0.05},
    "zip, α = β = 1": {"method": "zip", "refit": False},
    "select, no refit": {"method": "select", "refit": False},
    "average + refit": {"method": "average"},
    "permute + refit": {"method": "permute"},
    "select + refit": {"method": "select"},
    "zip + refit": {"method": "zip"},
    "zip + refit (default)": {"method": "zip", "refit": fxzip.RefitOptions(ridge=1e-3)},
    "default, fast": {"effort": "fast"},
    "default": {},
    "default, thorough": {"effort": "thorough"},
}
"""The ways to merge, by what tables call them; without refit every merge has its BatchNorm statistics reset. The
tables that speak of ``zip + refit (default)`` were made when that was the default."""


def timed_merge(prepared: fxzip.Prepared, **options: Any) -> tuple[fxzip.ZippedModel, float, float]:
    """A merge, its FLOPs in networks, and the seconds that it took."""
    seconds, _, zipped = timed(lambda: prepared.convert(progress=False, **options))
    return zipped, zipped.report.flops_after / zipped.report.before[0].flops, seconds


def timed_zip(
    networks: Sequence[nn.Module], loader: Iterable[Any], **options: Any
) -> tuple[fxzip.ZippedModel, float, float]:
    """As `timed_merge`, of networks that nothing was prepared of; FLOPs are in those of the second network."""
    seconds, _, zipped = timed(lambda: fxzip.zip(*networks, loader=loader, progress=False, **options))
    return zipped, zipped.report.flops_after / zipped.report.before[-1].flops, seconds


def measured(zipped: fxzip.ZippedModel) -> Row:
    """The agreement and the unexplained share that the report gives, and the method; nothing without fidelity."""
    fidelity = zipped.report.fidelity
    if fidelity is None:
        return {}
    return {"agreement": fidelity.agreement, "unexplained": fidelity.unexplained, "by": zipped.report.method}


def in_order(rows: Sequence[Row], cuts: Iterable[str], names: Iterable[str]) -> list[Row]:
    """The rows by cut and method in these orders, the ensembles first, in whatever order they were measured."""
    cuts, names = ["none", *cuts], ["ensemble", *names]
    return sorted(rows, key=lambda row: (cuts.index(row["cut"]), names.index(row["method"])))


def percent(right: Tensor) -> float:
    """The share of true values in percent."""
    return 100 * right.double().mean().item()
