"""The zoo: every architecture of timm and torchvision under the exact oracles: ``python -m benchmarks.zoo``.

One process for each model, within a time and a memory bound. Rows are kept in results/zoo.json as they come; a
model that is in it is not run again, unless ``--again`` or ``--failed`` is given. The table is docs/zoo.md, made from
the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.tables import markdown
from benchmarks.zoo_models import zoo

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"
TOLERANCE = 1e-9
COVERAGE = 0.95
Row = dict[str, Any]


def run(name: str, steps: str, seconds: float, mebibytes: int) -> Row:
    """The row of one model, from a process of its own; what it found until it was stopped, if it was."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "row.json", Path(folder) / "stderr"
        command = [sys.executable, "-m", "benchmarks.zoo_check", name, "--out", str(out), "--steps", steps]
        with errors.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True
            )
            stopped = _watch(process, seconds, mebibytes)
        row: Row = json.loads(out.read_text()) if out.exists() else {"name": name}
        if stopped:
            row["status"], row["error"] = "stopped", stopped
        elif process.returncode or row.get("status") not in ("done", "failed"):
            row["status"] = "crashed"
            row["error"] = f"exit status {process.returncode}: {errors.read_text()[-1000:]}"
    return row


def _watch(process: subprocess.Popen[bytes], seconds: float, mebibytes: int) -> str | None:
    """Wait for a process; kill it where it exceeds a bound, and say which."""
    start, why = time.monotonic(), None
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - start > seconds:
                why = f"more than {seconds:g} s"
            elif _memory(process.pid) > mebibytes:
                why = f"more than {mebibytes} MiB"
            if why:
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return why


def _memory(pid: int) -> int:
    """Resident memory of a process in MiB, 0 where it cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def passes(row: Row) -> bool:
    """Whether a model meets the bar: oracles 1, 2, 4 and 5, and the coverage."""
    return (
        row.get("status") == "done"
        and row["permutation_error"] < TOLERANCE
        and row["caught"] == row["mutations"]
        and row["self_zip_error"] < TOLERANCE
        and row["ensemble_error"] == 0
        and row["coverage"] >= COVERAGE
    )


HEADER = (
    "model", "traced by", "spaces", "coverage", "permutation", "mutations", "self-zip", "ensemble", "trace s",
    "analyse s", "peak MiB", "frozen, or what went wrong",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The page of the zoo."""
    good = sum(map(passes, rows))
    groups = {"timm": [], "torchvision": [], "backbone": []}  # type: dict[str, list[Row]]
    for row in rows:
        groups[row["name"].partition(":")[0]].append(row)
    counts = ", ".join(f"{sum(map(passes, mine))} of {len(mine)} {kind}" for kind, mine in groups.items() if mine)
    lines = [
        "# The zoo",
        "",
        f"{good} of {len(rows)} models pass oracles 1, 2, 4 and 5 with a coverage of {COVERAGE:.0%} or more: {counts}.",
        "Random weights, float64, differences as shares of the output's standard deviation. A model in bold does not",
        "pass. `timm` stands for the smallest model of each of its families. Made by `make zoo`.",
        "",
        markdown(HEADER, [_cells(row) for row in rows]),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    short = row["name"]
    mutations = f"{row['caught']}/{row['mutations']}" if "caught" in row else "-"
    notes = [*row.get("frozen", []), *([row["error"]] if row.get("error") else [])]
    return [
        short if passes(row) else f"**{short}**",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models; all of the zoo if none is named")
    parser.add_argument("--again", action="store_true", help="also those that have a row already")
    parser.add_argument("--failed", action="store_true", help="again those that do not pass")
    parser.add_argument("--steps", default="analyse,permute,mutate,merge")
    parser.add_argument("--seconds", type=float, default=600, help="bound for one model")
    parser.add_argument("--mebibytes", type=int, default=12_000, help="bound for one model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    if options.results.exists():
        rows = {row["name"]: row for row in json.loads(options.results.read_text())}
    names = options.names or zoo()
    again = [n for n in names if options.again or n not in rows or (options.failed and not passes(rows[n]))]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("zoo", total=len(again))
        for name in again:
            progress.update(task, description=name)
            rows[name] = run(name, options.steps, options.seconds, options.mebibytes)
            options.results.write_text(json.dumps([rows[n] for n in sorted(rows)], indent=1) + "\n")
            verdict = "passes" if passes(rows[name]) else rows[name].get("error") or rows[name]["status"]
            progress.console.print(f"{name}: {verdict.splitlines()[0][:150]}")
            progress.advance(task)
    options.page.parent.mkdir(exist_ok=True)
    options.page.write_text(table(list(rows.values())))


if __name__ == "__main__":
    main()
