"""Puts the benchmarks' tables into README.md, from their JSON: ``python -m benchmarks.tables``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is aligned to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo() -> str:
    """What ``fxzip demo`` measured."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    found: list[dict[str, Any]] = json.loads((RESULTS / "demo.json").read_text())["rows"]
    rows = [
        [
            r["name"],
            f"{r['flops'] / 1e6:.2f}",
            f"{r['params']:,}",
            *map(percent, (r["joint"], *r["tasks"], r["average"])),
        ]
        for r in found
    ]
    return markdown(("", "MFLOPs", "params", "joint", "0-4", "5-9", "average"), rows)


def replace(text: str, name: str, table: str) -> str:
    """The text with the table between its markers."""
    start, end = f"<!-- table: {name} -->", "<!-- end -->"
    pattern = re.compile(rf"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{table}\n\n{end}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replace(readme.read_text(), "demo", demo()))
