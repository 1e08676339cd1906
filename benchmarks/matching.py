"""How fast the matcher `zip` is, on one thread: against the plain reference and against one GEMM.

    python -m benchmarks.matching           # the reference up to 2n = 1024
    python -m benchmarks.matching --full    # the reference at all sizes (minutes)

Writes benchmarks/results/matching.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import rich
import torch
from rich.table import Table

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.reference_zip import reference_zip_merges
from benchmarks.lib.runs import Row, write
from benchmarks.lib.tables import printed
from fxzip.matching import match, zip_merges

SIZES = (256, 512, 1024, 2048, 4096)
REFERENCE_UP_TO = 1024
ALPHA, BETA = 0.3, 0.125
# Seconds of the paper's released match_tensors_zipit, as given in the project's issue 2; not measured here.
RELEASED = {256: 0.3, 512: 3.1, 1024: 25.0, 2048: 162.0}


def similarity_of(size: int, seed: int = 0) -> np.ndarray:
    """Correlations (size, size) of channels that mix size / 2 factors, in 2 · size samples, with noise."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((2 * size, size // 2)) @ rng.standard_normal((size // 2, size))
    noise = rng.standard_normal((2 * size, size)) * np.sqrt(size / 8)
    similarity: np.ndarray = np.corrcoef(factors + noise, rowvar=False)
    return similarity


def seconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The least wall time and the least CPU time of some runs: a busy machine only ever adds to them."""
    walls, cpus = zip(*(timed(run)[:2] for _ in range(repeats)), strict=True)
    return min(walls), min(cpus)


def measure(size: int, with_reference: bool, repeats: int) -> Row:
    """One row: wall and CPU seconds of each contender at 2n = size, and ratios of the CPU seconds."""
    similarity = similarity_of(size)
    matrix = torch.randn(size, size)
    row: Row = {"size": size, "released_not_measured_here": RELEASED.get(size)}
    row["zip"], row["zip_cpu"] = seconds(lambda: match("zip", similarity, n_models=2, alpha=ALPHA, beta=BETA), repeats)
    row["gemm"], row["gemm_cpu"] = seconds(lambda: matrix @ matrix, repeats)
    row["zip_over_gemm"] = row["zip_cpu"] / row["gemm_cpu"]
    row |= dict.fromkeys(("reference", "reference_cpu", "reference_over_zip", "same_merges"))
    if with_reference:
        expected: list[tuple[int, int]] = []
        row["reference"], row["reference_cpu"] = seconds(
            lambda: expected.extend(reference_zip_merges(similarity, 2, ALPHA, BETA)), repeats=1
        )
        row["reference_over_zip"] = row["reference_cpu"] / row["zip_cpu"]
        row["same_merges"] = zip_merges(similarity, 2, ALPHA, BETA) == expected
    return row


def growth(rows: list[Row], contender: str) -> dict[str, float | None]:
    """The exponent p of time ~ size^p: least squares over all sizes, and from the two largest."""
    known = [(row["size"], row[contender]) for row in rows if row[contender] is not None]
    if len(known) < 2:
        return {"all": None, "largest_two": None}
    size, times = np.log2(np.array(known, dtype=float)).T
    fit = float(np.polyfit(size, times, 1)[0])
    return {"all": fit, "largest_two": float((times[-1] - times[-2]) / (size[-1] - size[-2]))}


def table(rows: list[Row], exponents: dict[str, dict[str, float | None]], repeats: int) -> Table:
    def shown(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{value:.3g}{unit}"

    def cells(row: Row) -> list[str]:
        numbers = [shown(row[name]) for name in ("zip", "zip_cpu", "reference_cpu", "gemm_cpu")]
        ratios = [shown(row["reference_over_zip"], "x"), shown(row["zip_over_gemm"], "x")]
        return [str(row["size"]), *numbers, *ratios, {None: "", True: "yes", False: "NO"}[row["same_merges"]]]

    columns = ("2n", "zip wall", "zip", "ref.", "GEMM", "ref. / zip", "zip / GEMM", "same")
    powers = ", ".join(
        f"{name} {shown(power['all'])} (largest two: {shown(power['largest_two'])})"
        for name, power in exponents.items()
    )
    title = f"zip, alpha {ALPHA}, beta {BETA}: CPU seconds on one thread, best of {repeats}"
    made = printed(title, columns, [cells(row) for row in rows], left=())
    made.caption = f"growth, the p of (2n)^p: {powers}"
    return made


def main() -> None:
    line = CommandLine(__doc__).numbers(repeats=5).results("matching")
    line.parser.add_argument("--full", action="store_true", help="run the reference at all sizes")
    options = line.read()
    rows = []
    for size in SIZES:
        rows.append(measure(size, options.full or size <= REFERENCE_UP_TO, options.repeats))
        print(f"2n = {size}: {rows[-1]['zip']:.3f} s", file=sys.stderr)
    exponents = {name: growth(rows, f"{name}_cpu") for name in ("zip", "reference", "gemm")}
    rich.print(table(rows, exponents, options.repeats))
    result = {
        **facts("matching", torch.get_num_threads(), "numpy", "scipy"),
        "repeats": options.repeats,
        "alpha": ALPHA,
        "beta": BETA,
        "growth": exponents,
        "rows": rows,
    }
    write(options.json, result)


if __name__ == "__main__":
    main()
