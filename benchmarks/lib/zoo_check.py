"""One model of the zoo under the exact oracles.

The row is written after each step, so that what was found is not lost where a step takes too long.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.lib.machine import Stopwatch, peak_bytes, timed
from benchmarks.lib.runs import Row
from benchmarks.lib.zoo_models import input_shape, make, own_shape, shorten
from fxzip.channels import ChannelSpec
from fxzip.errors import FrozenSpaceWarning
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace import trace
from fxzip.testing import images, mutations_missed, permutation_error, randomise, self_zip_errors

STEPS = ("permute", "mutate", "merge", "fake")
"""What is done after tracing and analysing; ``fake``: nothing, and the weights have no values."""

WITH_WEIGHTS = STEPS[:-1]
BATCH = 8
MUTATIONS = 10
LARGE = 30_000_000
"""Models of more parameters are shortened: several copies in float64 must fit into memory."""


def inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A batch of random images, or of videos whose frames are random images; float64."""
    if len(shape) == 3:
        return images(BATCH, shape[-1], shape[0], seed)
    channels, frames, side, _ = shape
    return (
        images(4 * frames, side, channels, seed).reshape(4, frames, channels, side, side).transpose(1, 2).contiguous()
    )


def check(name: str, steps: Sequence[str], record: Callable[[Row], None]) -> None:
    """Fill the row of a model: how it was traced, its spaces, and what the oracles say of it."""
    row: Row = {"status": "running"}
    fake = "fake" in steps
    shape = own_shape(name) if fake else input_shape(name)
    x = torch.zeros(2, *shape) if fake else inputs(shape)
    made = make(name, fake=fake)
    row["parameters"] = sum(p.numel() for p in made.parameters())
    if not fake:
        row["left_out"] = shorten(made, shape) if row["parameters"] > LARGE else 0
        made = randomise(made, x)
    row["input"] = list(shape)
    spec = analyse(made, x, row)
    record(row)
    if "permute" in steps:
        record({"permutation_error": permutation_error(made, x[:2], spec)})
    if "mutate" in steps:
        tried = min(MUTATIONS, sum(len(space.sites) for space in spec.spaces if space.size > 1))
        missed = mutations_missed(spec.permute(made), x[:1], spec, most=MUTATIONS)
        record({"mutations": tried, "caught": tried - len(missed), "missed": [repr(site) for site in missed]})
    if "merge" in steps:
        errors = self_zip_errors(made, x, spec, cuts=(None, 0.0), methods=("permute", "zip"))
        record({"self_zip_error": errors[None], "ensemble_error": errors[0.0]})
    record({"status": "done"})


def analyse(model: nn.Module, x: Tensor, row: Row) -> ChannelSpec:
    """Trace and analyse a model; what was found and how long it took goes into the row."""
    row["seconds_trace"], _, graph = timed(lambda: trace(model, (x[:2],)))  # not compared with one without values
    row["traced_by"], row["nodes"] = graph.meta["traced_by"], len(graph.graph.nodes)
    kinds = {node.meta["val"].dtype for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    row["float32_inside"] = torch.float32 in kinds and x.dtype == torch.float64
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FrozenSpaceWarning)
        row["seconds_analyse"], _, spec = timed(lambda: analyse_graph(canonicalise(graph), (x[:2],), {}))
    row["spaces"], row["coverage"] = len(spec.spaces), spec.coverage
    row["frozen"] = [f"{space.name} ({space.size}): {space.reason}" for space in spec.frozen]
    row["warnings"] = list(dict.fromkeys(str(w.message) for w in caught if w.category is FrozenSpaceWarning))
    return spec


def check_to_file(name: str, steps: Sequence[str], out: Path) -> None:
    """Check a model in this process; the row goes to a file after each step."""
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise than the operations that a graph has
    watch = Stopwatch()
    row: Row = {"name": name}

    def record(found: Row) -> None:
        row.update(found)
        row["seconds"] = watch()[0]
        row["peak_mib"] = peak_bytes() >> 20
        out.write_text(json.dumps(row))

    try:
        check(name, steps, record)
    except Exception as error:
        traceback.print_exc()
        record({"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})
