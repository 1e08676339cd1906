"""How much of two residual streams one of the same width can hold, by the map that merges them.

    python -m benchmarks.streams --data ../shared/data [--only vit gpt]

The pairs are those of `benchmarks.transformers`, and so are the images. For each map M, (n × 2n), of the stream at its
merge point: the share of each network's stream that the best regression on M [x_A; x_B] leaves unexplained, over all
images. ``pca`` are the n directions of the greatest variance of both, each network's scaled to the same variance: no
linear map leaves less. ``procrustes`` turns the second stream by the orthogonal map that brings it nearest to the first
and averages. ``spread`` is how much ‖x_A‖ / ‖M x‖ differs from token to token, standard deviation over mean: where a
norm follows, one scale for all tokens is right if it is 0. Writes benchmarks/results/streams.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts
from benchmarks.lib.runs import Row, write
from benchmarks.lib.small_transformers import networks
from benchmarks.lib.tables import shown
from benchmarks.transformers import PAIRS, drawn
from fxzip.passes.compare import run_watched

FOUND = ("average", "permute", "zip", "select")


def measure(name: str, data: Path) -> Iterator[Row]:
    """A row for each map of a pair's stream."""
    setting, models = networks(PAIRS[name].make, PAIRS[name].seed, PAIRS[name].checkpoints, data)
    loader = drawn(setting, setting.calibration, PAIRS[name].seed)
    prepared = fxzip.prepare(*models, example_inputs=loader[0][:2])
    prepared.observe(loader, progress=False, hold_back=False)
    stream = max(prepared.spec.spaces, key=lambda space: len(space.sites))
    moments, (point,) = prepared.moments[stream.name], prepared.points[stream.name]
    maps = {method: prepared.plan(method=method).maps[stream.name].merge.double() for method in FOUND}
    scaled, scale = _scaled(moments.covariance)
    maps |= {"procrustes": _procrustes(scaled) * scale, "pca": _principal(scaled) * scale}
    images = torch.cat(loader)[:200]
    each = [_value(prepared, k, point.node, images) for k in range(len(models))]
    streams = torch.cat([value.flatten(0, -2) for value in each], -1).double()
    for label, merge in maps.items():
        left = _unexplained(moments.covariance, merge)
        whole = (streams @ merge.T).norm(dim=1)
        ratios = [part.norm(dim=1) / whole for part in streams.chunk(2, 1)]
        yield {
            "pair": name, "map": label, "first_unexplained": left[0], "second_unexplained": left[1],
            "mean_unexplained": sum(left) / 2, "spread": float(sum(r.std() / r.mean() for r in ratios) / 2),
        }  # fmt: skip


def _value(prepared: fxzip.Prepared, model: int, node: str, images: Tensor) -> Tensor:
    """What one network gives at a node of the first one's."""
    own = {names[0]: names[model] for names in prepared.alignment.shared}[node]
    with torch.no_grad():
        value: Tensor = run_watched(prepared.alignment.modules[model], [images], {own})[1][own]
    return value


def _scaled(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance with the same variance in both networks, and what their channels were multiplied by."""
    n = len(covariance) // 2
    power = covariance.diagonal().reshape(2, n).sum(1).rsqrt().repeat_interleave(n)
    return covariance * power[:, None] * power[None, :], power


def _procrustes(covariance: Tensor) -> Tensor:
    """[I Q] / 2 with the orthogonal Q that brings the second stream nearest to the first."""
    n = len(covariance) // 2
    left, _, right = torch.linalg.svd(covariance[:n, n:])
    return torch.cat([torch.eye(n, dtype=covariance.dtype), left @ right], 1) / 2


def _principal(covariance: Tensor) -> Tensor:
    n = len(covariance) // 2
    return torch.linalg.eigh(covariance)[1][:, n:].T


def _unexplained(covariance: Tensor, merge: Tensor) -> list[float]:
    """The share of each network's variance that a regression on the merged channels leaves."""
    crossed = merge @ covariance
    rest = covariance - crossed.T @ torch.linalg.pinv(crossed @ merge.T, rtol=1e-10, hermitian=True) @ crossed
    parts = zip(rest.diagonal().chunk(2), covariance.diagonal().chunk(2), strict=True)
    return [float(left.sum() / whole.sum()) for left, whole in parts]


def main() -> None:
    """Measure, print and write."""
    options = CommandLine(__doc__).data("a folder with mnist.npz").results("streams").several("only", PAIRS).read()
    rows = [row for name in options.only for row in measure(name, options.data)]
    Console().print(shown(rows, "streams"))
    write(options.json, {**facts("streams", 1), "rows": rows})


if __name__ == "__main__":
    main()
