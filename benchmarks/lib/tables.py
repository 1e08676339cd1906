"""The benchmarks' results as tables: to print, and for README.md and the docs, from their JSON.

A page says ``<!-- table: NAME -->`` and ``<!-- end -->``. What stands between is replaced by the table of
results/NAME.json, or of each file that fits a pattern. README.md keeps it, the docs get it when they are built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.lib.runs import BENCHMARKS, RESULTS

ROOT = BENCHMARKS.parent
MARKED = re.compile(r"<!-- table: (?P<name>[\w*-]+) -->.*?<!-- end -->", re.DOTALL)

Row = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table; the columns of these numbers are aligned to the left, the others to the right."""
    lines = [header, ["---" if number in left else "---:" for number in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def printed(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> Table:
    """The same to print."""
    result = Table(title=title)
    for number, column in enumerate(header):
        result.add_column(column, justify="left" if number in left else "right")
    for row in rows:
        result.add_row(*row)
    return result


def shown(rows: Sequence[Row], title: str) -> Table:
    """Rows to print, a column for each key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[brief(row.get(column)) for column in columns] for row in rows]
    left = [number for number, column in enumerate(columns) if column == "method"]
    return printed(title, [column.replace("_", ", ") for column in columns], cells, left)


def brief(value: object) -> str:
    """A value to print, numbers in four digits."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def demo(rows: Sequence[Row]) -> str:
    """What ``fxzip demo`` measured."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    found = [
        [
            r["name"],
            f"{r['flops'] / 1e6:.2f}",
            f"{r['params']:,}",
            *map(percent, (r["joint"], *r["tasks"], r["average"], r["agrees"])),
        ]
        for r in rows
    ]
    return markdown(("", "MFLOPs", "params", "joint", "0-4", "5-9", "average", "agree"), found)


def transformers(rows: Sequence[Row]) -> str:
    """Pairs of transformers, and how far behind the networks alone each merge is."""
    alone = {row["pair"]: row["accuracy"] for row in rows if row["method"] == "alone"}
    fits = {"none": "", "refit": " + refit", "polish": " + refit + polish"}
    found = [
        [
            r["pair"],
            f"{r['method']}{fits[r['fit']]}",
            r["cut"],
            f"{r['width']:g}",
            str(r["images"] or "-"),
            f"{r['flops']:.2f}",
            f"{r['accuracy']:.1f}",
            "-" if r["method"] == "alone" else f"{alone[r['pair']] - r['accuracy']:.1f}",
            f"{r['loss']:.2f}",
        ]
        for r in rows
    ]
    header = ("pair", "method", "cut", "width", "inputs of each", "FLOPs", "accuracy", "behind", "loss")
    return markdown(header, found, left=(0, 1, 2))


def cell(value: Any) -> str:
    """Any value of a row: numbers in three digits, sizes in MiB."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return " - ".join(map(cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def plain(rows: Sequence[Row]) -> str:
    """A column for each key that has plain values in some row."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None and _is_plain(value))
    found = [[cell(_in_units(key, row.get(key))) for key in keys] for row in rows]
    left = [number for number, key in enumerate(keys) if not number or any(isinstance(r.get(key), str) for r in rows)]
    return markdown([_heading(key) for key in keys], found, left)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 3 and all(isinstance(part, int | float) for part in value)
    return isinstance(value, str | int | float)


def _heading(key: str) -> str:
    words = key.replace("_", " ")
    words = re.sub(r"^(.*) (s|seconds)$", r"\1, s", words)
    return f"{' '.join(words.replace('bytes', '').split())}, MiB" if "bytes" in words else words


def _in_units(key: str, value: Any) -> Any:
    return value / 2**20 if "bytes" in key and isinstance(value, int | float) else value


def by_section(rows: Sequence[Row]) -> str:
    """A table for each section, which a row names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["section"], []).append({key: row[key] for key in row if key != "section"})
    return "\n\n".join(f"**{section}**\n\n{plain(mine)}" for section, mine in found.items())


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"demo": demo, "scale": by_section, "transformers": transformers}
"""Tables of their own; the others have a column for each key."""


def rows_of(found: Any) -> dict[str, list[Row]]:
    """The rows in a file of results, by title: a list of them, ``rows``, or all the lists of rows one level below."""
    if isinstance(found, list):
        return {"": found}
    if "rows" in found:
        return {"": found["rows"]}
    groups = [found, *(value for value in found.values() if isinstance(value, dict))]
    return {
        str(key): value
        for group in groups
        for key, value in group.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }


def table(path: Path) -> str:
    """The table of a file of results, or several, each under its title."""
    found = rows_of(json.loads(path.read_text(encoding="utf-8")))
    show = TABLES.get(path.stem, plain)
    return "\n\n".join(f"**{title}**\n\n{show(rows)}" if title else show(rows) for title, rows in found.items())


def source(path: Path) -> str:
    """What made a file of results, and with which versions."""
    found = json.loads(path.read_text(encoding="utf-8"))
    facts = [f"`{path.relative_to(ROOT)}`"]
    if isinstance(found, dict):
        if "command" in found:
            facts.insert(0, f"`{found['command']}`")
        facts += [found["setting"]] if "setting" in found else []
        facts += [f"{name} {version}" for name, version in found.get("versions", {}).items()]
        facts += [f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"] if "threads" in found else []
    return f"From {', '.join(facts)}."


def fill(text: str, *, sources: bool = False) -> str:
    """The text with a table between each pair of markers.

    Args:
        text: Markdown.
        sources: Say below each table where it is from.
    """

    def block(match: re.Match[str]) -> str:
        start, end = match[0].split("-->", 1)[0] + "-->", "<!-- end -->"
        paths = sorted(RESULTS.glob(f"{match['name']}.json"))
        if not paths:
            return f"{start}\n\nNot measured yet: `python -m benchmarks.{match['name'].strip('*_')}`\n\n{end}"
        parts = [table(path) + (f"\n\n{source(path)}" if sources else "") for path in paths]
        return "\n\n".join((start, *parts, end))

    return MARKED.sub(block, text)
