"""Runs the guides' examples and keeps what their cells print: ``python docs/examples/run.py [NAME ...]``.

The docs show it below each cell. A cell that shows no more than its text has nothing there.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTPUTS = HERE / "outputs.json"
HELPERS = ("digits", "run")
CELL = re.compile(r"^# %%(?P<text> \[markdown\])?.*\n", re.MULTILINE)


def examples() -> list[Path]:
    """The guides' scripts."""
    return [path for path in sorted(HERE.glob("*.py")) if path.stem not in HELPERS]


def cells(source: str) -> Iterator[tuple[bool, str, int]]:
    """Whether each cell of a py-percent script is text, what it holds, and the line before it."""
    starts = list(CELL.finditer(source))
    ends = [match.start() for match in starts[1:]] + [len(source)]
    for start, end in zip(starts, ends, strict=True):
        yield bool(start["text"]), source[start.end() : end].strip("\n"), source.count("\n", 0, start.end())


def run(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Run a script in the working folder; returns what each cell of code prints, and the names at the end."""
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    outputs = []
    for is_text, body, line in cells(path.read_text(encoding="utf-8")):
        if is_text:
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            exec(compile("\n" * line + body, str(path), "exec"), names)  # tracebacks show the script's lines
        outputs.append("\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines()))
    return outputs, names


def main() -> None:
    """Run some examples, or all of them, and write down what they print."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(HERE))
    kept = json.loads(OUTPUTS.read_text(encoding="utf-8")) if OUTPUTS.exists() else {}
    wanted = sys.argv[1:] or [path.stem for path in examples()]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for path in examples():
            if path.stem in wanted:
                outputs, _ = run(path)
                kept[path.stem] = [re.sub(rf"{tempfile.gettempdir()}/tmp\w+", "…", text) for text in outputs]
    OUTPUTS.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
