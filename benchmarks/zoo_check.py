"""One model of the zoo under the exact oracles: ``python -m benchmarks.zoo_check timm:resnet18 --out row.json``.

The row is written after each step, so that what was found is not lost where a step takes too long.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models import input_shape, make
from fxzip.channels import ChannelSpec
from fxzip.errors import FrozenSpaceWarning
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace import trace
from tests.oracles import images, mutations_missed, permutation_error, randomise, self_zip_errors

STEPS = ("analyse", "permute", "mutate", "merge")
BATCH = 8
MUTATIONS = 10


def inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A batch of random images, or of videos whose frames are random images; float64."""
    if len(shape) == 3:
        return images(BATCH, shape[-1], shape[0], seed)
    channels, frames, side, _ = shape
    return (
        images(4 * frames, side, channels, seed).reshape(4, frames, channels, side, side).transpose(1, 2).contiguous()
    )


def check(name: str, steps: tuple[str, ...], record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The row of a model: how it was traced, its spaces, and what the oracles say of it."""
    row: dict[str, Any] = {"name": name, "status": "running"}
    shape = input_shape(name, make(name))
    x = inputs(shape)
    row["input"] = list(shape)
    model = randomise(make(name), x)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    spec = analyse(model, x, row)
    record(row)
    if "permute" in steps:
        row["permutation_error"] = permutation_error(model, x[:2], spec)
        record(row)
    if "mutate" in steps:
        tried = min(MUTATIONS, sum(len(space.sites) for space in spec.spaces if space.size > 1))
        missed = mutations_missed(spec.permute(model), x[:1], spec, most=MUTATIONS)
        row["mutations"], row["caught"] = tried, tried - len(missed)
        row["missed"] = [repr(site) for site in missed]
        record(row)
    if "merge" in steps:
        errors = self_zip_errors(model, x, spec)
        row["self_zip_error"] = max(errors["permute"], errors["zip"])
        row["ensemble_error"] = errors["ensemble"]
    row["status"] = "done"
    return row


def analyse(model: nn.Module, x: Tensor, row: dict[str, Any]) -> ChannelSpec:
    """Trace and analyse a model; what was found and how long it took goes into the row."""
    start = time.perf_counter()
    graph = trace(model, (x[:2],))
    row["seconds_trace"] = time.perf_counter() - start
    row["traced_by"], row["nodes"] = graph.meta["traced_by"], len(graph.graph.nodes)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FrozenSpaceWarning)
        spec = analyse_graph(canonicalise(graph), (x[:2],), {})
    row["seconds_analyse"] = time.perf_counter() - start
    row["spaces"], row["coverage"] = len(spec.spaces), spec.coverage
    row["frozen"] = [f"{space.name} ({space.size}): {space.reason}" for space in spec.frozen]
    row["warnings"] = list(dict.fromkeys(str(w.message) for w in caught if w.category is FrozenSpaceWarning))
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    row: dict[str, Any] = {"name": options.name}

    def record(found: dict[str, Any]) -> None:
        row.update(found)
        row["seconds"] = time.perf_counter() - start
        row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if options.out:
            options.out.write_text(json.dumps(row))

    try:
        record(check(options.name, tuple(options.steps.split(",")), record))
    except Exception as error:
        traceback.print_exc()
        record({"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
