"""What verification costs: the time of its checks over that of a default merge, in one run.

    python -m benchmarks.verify [--threads 2] [--images 512]

Each network is merged with another one of random weights, on random images of its own size. A merge of ResNet-50 takes
many minutes, so only its checks are timed. Writes benchmarks/results/verify.json.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

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


def measure(name: str, images: int) -> dict[str, Any]:
    """Seconds of each check, and of a default merge without them."""
    import fxzip
    from fxzip.passes.verify import Verifier, ensemble_error

    torch.manual_seed(0)
    models = [timm.create_model(name).eval() for _ in range(2)]
    batches = [torch.randn(BATCH, *models[0].default_cfg["input_size"]) for _ in range(images // BATCH)]
    seconds, _, prepared = timed(lambda: fxzip.prepare(*models, example_inputs=batches[0][:2], verify=False))
    row: dict[str, Any] = {"model": name, "prepare": seconds}
    prepared.observe([batches[0][:2]], progress=False)
    plan, spec = prepared.plan(method="permute"), prepared.spec
    verifier = Verifier(prepared.alignment.modules[0], spec.example)
    row["permutation"], _, (_, verified) = timed(lambda: verifier.checked_spec(spec))
    row["merge"], _, off = timed(lambda: verifier.merge_error(plan))
    first = prepared.places.cuts.valid[0]
    row["ensemble"], _, _ = timed(lambda: ensemble_error(prepared.alignment, spec, spec.example, first))
    row["verify"] = row["permutation"] + row["merge"] + row["ensemble"]
    row["off"] = max(verified.permutation, off)
    if MERGED[name]:
        row["whole"], _, _ = timed(lambda: fxzip.zip(*models, batches, verify=False, progress=False))
        row["share"] = row["verify"] / row["whole"]
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table."""
    header = ("model", "permutation", "self-merge", "ensemble", "merge", "share", "off")
    shown = []
    for row in rows:
        seconds = [f"{row[key]:.2f}" for key in ("permutation", "merge", "ensemble")]
        whole = [f"{row['whole']:.1f}", f"{row['share']:.1%}"] if "whole" in row else ["-", "-"]
        shown.append([row["model"], *seconds, *whole, f"{row['off']:.1e}"])
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
