"""Tables of what is on the pages of docs/api: each name, which leads there, and the first line of its docstring."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).parent
MARKED = re.compile(r"<!-- api: (?P<page>\w+) -->")


def fill_api(text: str) -> str:
    """Text with a table for each page that it marks: ``<!-- api: merging -->``."""
    return MARKED.sub(lambda match: table(match["page"]), text)


def table(page: str) -> str:
    """The table of one page."""
    rows = [f"| [`{name}`][{name}] | {_summary(value)} |" for name, value in documented(page).items()]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def documented(page: str) -> dict[str, Any]:
    """What a page tells of, by name and in its order; modules, whose text stands between, are left out."""
    names = re.findall(r"^::: (\S+)", (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
    if len(set(names)) < len(names):
        raise ValueError(f"{page}: a name stands there twice")
    found = {name: package()[name.removeprefix("fxzip.")] for name in names}
    return {name: value for name, value in found.items() if not value.is_module}


@cache
def package() -> Any:
    """The source of fxzip, which is read and not run."""
    return griffe.load("fxzip", search_paths=[DOCS.parent], resolve_aliases=True)


def _summary(value: Any) -> str:
    text: str = value.docstring.value.partition("\n")[0] if value.docstring else ""
    if not text:
        raise ValueError(f"{value.path} has no docstring")
    return text.replace("|", "\\|")
