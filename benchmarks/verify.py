"""What verification costs: the time of its checks over that of a default merge, in one run.

    python -m benchmarks.verify [--threads 2] [--images 512]

Each network is merged with another one of random weights, on random images of its own size. A merge of ResNet-50 takes
many minutes, so only its checks are timed. Seconds are by the clock and, ``_cpu``, of the processor over all threads,
of which other work on the machine changes little: the share is of these. A merge of more images takes longer, the
checks do not, so the share of few images bounds that of many. Writes benchmarks/results/verify.json.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any, TypeVar

import timm
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.runs import write
from benchmarks.lib.tables import printed

MERGED = {"resnet18": True, "vit_tiny_patch16_224": True, "resnet50": False}
"""timm's names, and whether the whole merge is timed too."""
BATCH = 32
CHECKS = ("permutation", "merge", "ensemble")
T = TypeVar("T")


def measure(name: str, images: int) -> dict[str, Any]:
    """Seconds of each check, and of a default merge without them."""
    import fxzip
    from fxzip.passes.verify import Verifier, ensemble_error

    torch.manual_seed(0)
    models = [timm.create_model(name).eval() for _ in range(2)]
    batches = [torch.randn(BATCH, *models[0].default_cfg["input_size"]) for _ in range(images // BATCH)]
    row: dict[str, Any] = {"model": name}

    def clocked(key: str, run: Callable[[], T]) -> T:
        row[key], row[f"{key}_cpu"], result = timed(run)
        return result

    prepared = clocked("prepare", lambda: fxzip.prepare(*models, example_inputs=batches[0][:2], verify=False))
    prepared.observe([batches[0][:2]], progress=False)
    plan, spec = prepared.plan(method="permute"), prepared.spec
    verifier = Verifier(prepared.alignment.modules[0], spec.example)
    _, verified = clocked("permutation", lambda: verifier.checked_spec(spec))
    off = clocked("merge", lambda: verifier.merge_error(plan))
    first = prepared.places.cuts.valid[0]
    clocked("ensemble", lambda: ensemble_error(prepared.alignment, spec, spec.example, first))
    for clock in ("", "_cpu"):
        row[f"verify{clock}"] = sum(row[f"{check}{clock}"] for check in CHECKS)
    row["off"] = max(verified.permutation, off)
    if MERGED[name]:
        clocked("whole", lambda: fxzip.zip(*models, batches, verify=False, progress=False))
        row["share"] = row["verify_cpu"] / row["whole_cpu"]
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    header = ("model", *CHECKS, "all", "of the processor", "whole merge", "of the processor", "share", "off")
    shown = []
    for row in rows:
        keys = (*CHECKS, "verify", "verify_cpu", "whole", "whole_cpu")
        seconds = [f"{row[key]:.2f}" if key in row else "-" for key in keys]
        shown.append([row["model"], *seconds, f"{row['share']:.1%}" if "share" in row else "-", f"{row['off']:.1e}"])
    return printed("Verification, seconds", header, shown)


def main() -> None:
    command = CommandLine(__doc__).several("models", MERGED).numbers(threads=2, images=512).results("verify")
    options: Namespace = command.read()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows.append(measure(name, options.images))
        write(options.json, {**facts("verify", options.threads, "timm"), "images": options.images, "rows": rows})
    Console().print(table(rows))


if __name__ == "__main__":
    main()
