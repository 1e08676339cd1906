"""Hooks of mkdocs: guides are made from docs/examples, tables from the benchmarks' JSON and from docstrings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS), str(DOCS / "examples")]

from api_tables import fill_api
from run import OUTPUTS, cells, examples

from benchmarks.lib.tables import fill


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each example."""
    outputs = json.loads(OUTPUTS.read_text(encoding="utf-8"))
    for path in examples():
        text = page_of(path.read_text(encoding="utf-8"), outputs[path.stem]) + f"\n{origin(path)}\n"
        files.append(File.generated(config, f"guides/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables."""
    return fill_api(fill(markdown, sources=True))


def page_of(source: str, outputs: Sequence[str]) -> str:
    """A py-percent script as Markdown: text as it is, code in fences, and below it what it prints."""
    parts = []
    left = list(outputs)
    for is_text, body, _ in cells(source):
        if is_text:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE))
            continue
        parts.append(f"```python\n{body}\n```")
        if printed := left.pop(0):
            parts.append(f'```text title="prints"\n{printed}\n```')
    if left:
        raise ValueError("the examples have other cells than before: run docs/examples/run.py")
    return "\n\n".join(parts) + "\n"


def origin(path: Path) -> str:
    """Where a guide's code is."""
    name = path.relative_to(DOCS.parent)
    return f"---\n\nAll code of this page is `{name}`; `digits.py` beside it trains the networks. The tests run it."
