"""Widths on real architectures: ``python -m benchmarks.widths_check``.

Each model is made wider by dead channels, and by copies of its channels and then narrow again (`fxzip.testing`): both
must be the model. Rows are kept in results/widths_check.json as they come; each says which families of channel spaces
can change, and why the others cannot. One process for each model, within a time and a memory bound.
"""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import Bounds, Stopwatch, in_fresh_process
from benchmarks.lib.runs import RESULTS, Row, write
from benchmarks.lib.zoo_check import LARGE, inputs
from benchmarks.lib.zoo_models import input_shape, make, shorten
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier, fixed_sizes
from fxzip.testing import TOLERANCE, dropping_error, padding_error, randomise

OUT = RESULTS / "widths_check.json"
SAMPLES = 2
PRELOADED = ("benchmarks.widths_check", "timm", "torchvision")


def check(name: str) -> Row:
    """The row of one model."""
    watch, shape = Stopwatch(), input_shape(name)
    x = inputs(shape)
    made = make(name)
    if sum(p.numel() for p in made.parameters()) > LARGE:
        shorten(made, shape)
    model, x = randomise(made, x), x[:SAMPLES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = canonicalise(trace(model, (x,)))
        spec = analyse_graph(module, (x,), {})
        roots = [space for space in spec.spaces if space.parent is None]
        fixed = fixed_sizes(Verifier(module, ((x,), {})), spec)
        row: Row = {"name": name, "input": list(shape), "families": len(roots), "resizable": len(roots) - len(fixed)}
        row["fixed"] = {key: why[:160] for key, why in fixed.items()}
        row["seconds_fixed"] = watch()[0]
        if row["resizable"]:
            row["padding_error"] = padding_error(model, x, fixed=fixed)
            row["dropping_error"] = dropping_error(model, x, fixed=fixed)
    row["seconds"] = watch()[0]
    return row


def check_to_file(name: str, out: Path) -> None:
    """Check a model in this process; its row goes to a file."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        row = check(name)
    except Exception as error:
        traceback.print_exc()
        row = {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}
    out.write_text(json.dumps(row))


def passes(row: Row) -> bool:
    """Whether some spaces can change, and both oracles are exact."""
    worst = max(row.get("padding_error", 1.0), row.get("dropping_error", 1.0))
    return bool(worst < TOLERANCE)


def names() -> list[str]:
    """The models of the zoo that pass there, the smallest first."""
    known = json.loads((RESULTS / "zoo.json").read_text())
    good = [row for row in known if row.get("status") == "done" and row.get("permutation_error", 1) < TOLERANCE]
    return [row["name"] for row in sorted(good, key=lambda row: int(row["parameters"]))]


def run(name: str, bounds: Bounds) -> Row:
    """The row of one model, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        ended: Any = in_fresh_process(check_to_file, name, out, bounds=bounds, preload=PRELOADED)
        row: Row = json.loads(out.read_text()) if out.exists() else {"name": name}
    return row if ended.error is None else row | {"error": str(ended.error)}


def main() -> None:
    """Run what is missing, and write the rows as they come."""
    line = CommandLine(__doc__).numbers("bound for one model", mebibytes=6_000)
    line.parser.add_argument("names", nargs="*", help="models; the smallest of the zoo if none is named")
    line.parser.add_argument("--seconds", type=float, default=240, help="bound for one model; default: %(default)s")
    line.parser.add_argument("--most", type=int, default=100, help="models; default: %(default)s")
    line.parser.add_argument("--again", action="store_true", help="also those that have a row already")
    options = line.read()
    rows = {row["name"]: row for row in json.loads(OUT.read_text())} if OUT.exists() else {}
    for name in (options.names or names())[: options.most]:
        if name in rows and not options.again:
            continue
        rows[name] = run(name, Bounds(options.seconds, options.mebibytes))
        write(OUT, [rows[key] for key in sorted(rows)])
        row = rows[name]
        verdict = "exact" if passes(row) else row.get("error", "not exact")
        print(f"{name}: {verdict}, {row.get('resizable')} of {row.get('families')}", flush=True)
    print(f"{sum(map(passes, rows.values()))} of {len(rows)} exact")


if __name__ == "__main__":
    main()
