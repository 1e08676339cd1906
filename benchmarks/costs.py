"""What a merge takes: seconds and memory, of whole merges at full size: ``python -m benchmarks.costs``.

Two networks of timm with random weights are merged on random images of their own size, in a process of its own each.
Seconds are of the processor over all threads, of which other work on the machine changes little. Memory is the
process's greatest, PyTorch and both networks included, and beside it what the two networks alone take.
Rows are kept in benchmarks/results/costs.json as they come.
"""

from __future__ import annotations

import warnings
from typing import Any

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts, in_fresh_process, peak_bytes, timed
from benchmarks.lib.runs import Kept, Row

MODELS = ("mobilenetv3_small_100", "resnet18", "deit_tiny_patch16_224")


def measure(name: str, images: int, effort: str) -> Row:
    """The row of one architecture."""
    import timm
    import torch

    import fxzip

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=classes).eval() for classes in (100, 50)]
    batches = torch.randn(images, *models[0].default_cfg["input_size"]).split(16)
    own = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    options: dict[str, Any] = {"effort": effort, "progress": False}
    _, seconds, zipped = timed(lambda: fxzip.zip(*models, batches, **options))
    return {
        "model": name,
        "images": images,
        "effort": effort,
        "minutes": round(seconds / 60, 2),
        "networks_mb": round(own / 1e6),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "flops": round(len(models) * zipped.report.flops_after / zipped.report.flops_before, 3),
    }


def main() -> None:
    """Measure what has no row yet."""
    line = CommandLine(__doc__).several("models", MODELS).numbers(threads=1, images=64)
    line.parser.add_argument("--effort", default="fast", help="default: %(default)s")
    options = line.results("costs").read()
    kept = Kept(options.json, facts("costs", options.threads, "timm"), ("model", "images", "effort"))
    for name in options.models:
        if (name, options.images, options.effort) not in kept:
            ended = in_fresh_process(measure, name, options.images, options.effort, threads=options.threads)
            kept.extend([ended.value] if ended.value is not None else [{"model": name, "error": ended.error}])


if __name__ == "__main__":
    main()
