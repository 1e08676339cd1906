"""The zoo: every architecture of timm and torchvision under the exact oracles: ``python -m benchmarks.zoo``.

One process for each model, within a time and a memory bound. Rows are kept in results/zoo.json as they come; a
model that is in it is not run again, unless ``--again`` or ``--failed`` is given. The table is docs/zoo.md, made from
the JSON. ``--all`` is the second zoo: all models of timm, traced and analysed at their full size on weights without
values, in results/zoo_all.json and docs/zoo_all.md.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import Bounds, in_fresh_process
from benchmarks.lib.runs import RESULTS, Row, write
from benchmarks.lib.tables import ROOT, markdown
from benchmarks.lib.zoo_check import STEPS, WITH_WEIGHTS, check_to_file
from benchmarks.lib.zoo_models import all_of_timm, zoo
from fxzip.testing import TOLERANCE

PAGE = ROOT / "docs" / "zoo.md"
PAGE_OF_ALL = ROOT / "docs" / "zoo_all.md"
TOLERANCE_32 = 1e-5
"""Of models that compute some of it in float32, whatever they are given."""
COVERAGE = 0.95
LESS_COVERED = {
    "timm:gmlp_ti16_224": "its spatial gates weigh pixels, which have fixed places",
    "timm:sequencer2d_s": "the states of its LSTMs are kept in place",
}
"""Models that are covered by less, and why no more is possible."""
PRELOADED = ("benchmarks.lib.zoo_check", "timm", "torchvision")


def run(name: str, steps: Sequence[str], bounds: Bounds) -> Row:
    """The row of one model, from a process of its own; what it found until it was stopped, if it was."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        ended = in_fresh_process(check_to_file, name, steps, out, bounds=bounds, preload=PRELOADED)
        row: Row = json.loads(out.read_text()) if out.exists() else {"name": name}
    if ended.error is not None:
        row |= {"status": "stopped" if ended.stopped else "crashed", "error": ended.error}
    return row


def passes(row: Row) -> bool:
    """Whether a model meets the bar: the coverage, and oracles 1, 2, 4 and 5 where they were run."""
    tolerance = TOLERANCE_32 if row.get("float32_inside") else TOLERANCE
    return (
        row.get("status") == "done"
        and (row["coverage"] >= COVERAGE or row["name"] in LESS_COVERED)
        and row.get("permutation_error", 0) < tolerance
        and row.get("caught") == row.get("mutations")
        and row.get("self_zip_error", 0) < tolerance
        and row.get("ensemble_error", 0) == 0
    )


HEADER = (
    "model", "traced by", "spaces", "coverage", "permutation", "mutations", "self-zip", "ensemble", "trace s",
    "analyse s", "peak MiB", "frozen, or what went wrong",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The page of the zoo."""
    good = sum(map(passes, rows))
    counts = ", ".join(f"{sum(map(passes, mine))} of {len(mine)} {kind}" for kind, mine in _by_kind(rows).items())
    lines = [
        "# The zoo",
        "",
        f"{good} of {len(rows)} models pass oracles 1, 2, 4 and 5 with a coverage of {COVERAGE:.0%} or more: {counts}.",
        "Random weights, float64, differences as shares of the output's standard deviation. A model in bold does not",
        "pass. `timm` stands for the smallest model of each of its families. Models of more than 30 million parameters",
        "are shortened: of blocks of equal shapes in a row two are kept; how many went stands behind the name.",
        "Made by `make zoo`.",
        "",
        markdown(HEADER, [_cells(row) for row in rows]),
        "",
    ]
    return "\n".join(lines)


def table_of_all(rows: Sequence[Row]) -> str:
    """The page of all models of timm, without what takes weights."""
    good = [row for row in rows if row.get("status") == "done"]
    covered = sum(map(passes, rows))
    shown = [n for n, title in enumerate(HEADER) if title not in ("permutation", "mutations", "self-zip", "ensemble")]
    lines = [
        "# All of timm",
        "",
        f"{len(good)} of {len(rows)} models are traced and analysed at their full size, on weights without values;",
        f"{covered} are covered to {COVERAGE:.0%} or more, or excepted by name. The others are in bold.",
        "Made by `make zoo-all`.",
        "",
        markdown([HEADER[n] for n in shown], [[_cells(row)[n] for n in shown] for row in rows]),
        "",
    ]
    return "\n".join(lines)


def _by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"].partition(":")[0], []).append(row)
    return groups


def _cells(row: Row) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    short = row["name"] if passes(row) else f"**{row['name']}**"
    mutations = f"{row['caught']}/{row['mutations']}" if "caught" in row else "-"
    notes = [*row.get("frozen", []), *([row["error"]] if row.get("error") else [])]
    notes += ["it computes in float32 inside"] if row.get("float32_inside") else []
    notes += [LESS_COVERED[row["name"]]] if row["name"] in LESS_COVERED else []
    return [
        f"{short} (-{row['left_out']})" if row.get("left_out") else short,
        row.get("traced_by", "-"),
        number("spaces", "d"),
        number("coverage", ".3%"),
        number("permutation_error", ".0e"),
        mutations,
        number("self_zip_error", ".0e"),
        number("ensemble_error", ".0e"),
        number("seconds_trace", ".1f"),
        number("seconds_analyse", ".1f"),
        number("peak_mib", "d"),
        "<br>".join(_plain(note) for note in notes[:3]) + ("<br>..." if len(notes) > 3 else ""),
    ]


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())[:200]


def run_all(names: Sequence[str], steps: Sequence[str], bounds: Bounds, jobs: int, keep: Callable[[Row], None]) -> None:
    """The rows of models, ``jobs`` at a time; ``keep`` is given each as it comes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    lock = threading.Lock()
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("zoo", total=len(names))

        def one(name: str) -> None:
            row = run(name, steps, bounds)
            with lock:
                keep(row)
                verdict = "passes" if passes(row) else row.get("error") or row["status"]
                progress.console.print(f"{name}: {verdict.splitlines()[0][:150]}")
                progress.advance(task)

        list(pool.map(one, names))


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """How many models are as they should be, and why the others are not."""
    rows = list(rows)
    wrong = Counter(row.get("error") or (row["frozen"] or ["frozen by little"])[0] for row in rows if not passes(row))
    return {
        "models": len(rows),
        "pass": sum(map(passes, rows)),
        "traced by": dict(Counter(row.get("traced_by", "-") for row in rows)),
        "others": dict(wrong.most_common(10)),
    }


def command_line() -> CommandLine:
    """The options."""
    line = CommandLine(__doc__).numbers("models at a time, a thread for each", jobs=1)
    line.numbers("bound for one model", mebibytes=12_000)
    add = line.parser.add_argument
    add("names", nargs="*", help="models; all of the zoo if none is named")
    add("--all", action="store_true", help="all of timm, traced and analysed without weights")
    add("--list", action="store_true", help="print the names of the models, and stop")
    add("--again", action="store_true", help="also those that have a row already")
    add("--failed", action="store_true", help="again those that do not pass")
    add("--steps", nargs="+", choices=STEPS, help="what to do; default: all that the models have weights for")
    add("--seconds", type=float, default=600, help="bound for one model; default: %(default)s")
    return line


def main() -> None:
    """Run what is missing, write the rows and the page as they come."""
    options = command_line().read()
    names = options.names or (all_of_timm() if options.all else zoo())
    if options.list:
        print("\n".join(names))
        return
    path = RESULTS / ("zoo_all.json" if options.all else "zoo.json")
    found = json.loads(path.read_text()) if path.exists() else []
    rows: dict[str, Row] = {row["name"]: row for row in found}
    again = [n for n in names if options.again or n not in rows or (options.failed and not passes(rows[n]))]
    steps = options.steps or (["fake"] if options.all else WITH_WEIGHTS)

    def save() -> None:
        ordered = [rows[n] for n in sorted(rows)]
        write(path, ordered)
        page, text = (PAGE_OF_ALL, table_of_all(ordered)) if options.all else (PAGE, table(ordered))
        page.write_text(text)

    def keep(row: Row) -> None:
        rows[row["name"]] = row
        save()

    run_all(again, steps, Bounds(options.seconds, options.mebibytes), options.jobs, keep)
    save()
    print(json.dumps(summary(rows.values()), indent=1))


if __name__ == "__main__":
    main()
