"""The model card of a saved network: Markdown in which every name and text stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel

_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$^=/])")
_SHOWN = 20
"""The most names of classes that a card lists."""
_UNSEEN = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def model_card(zipped: ZippedModel) -> str:
    """A README in Markdown with the tasks, how to load the network, and the report."""
    report = zipped.report
    inputs = "\n".join(f"- {_code(str(node.target))}" for node in zipped.trunk.graph.find_nodes(op="placeholder"))
    labels = {name: zipped.labels.get(name, ()) for name in zipped.names}
    tasks = "\n".join(f"- {_code(name)}{_classes(found)}" for name, found in labels.items())
    config = zipped.information.preparation.config
    prepared = "".join(f"\n- {_text(key)}: {_code(str(value))}" for key, value in config.items())
    return f"""---
library_name: fxzip
tags: [fxzip, model-merging, pytorch]
---

# {" + ".join(map(_text, zipped.names))}

{_origin(zipped)}

```python
import fxzip

zipped = fxzip.load("this folder")  # needs neither the models' code nor pickle
outputs = zipped(*inputs)           # one for each task
one = zipped(*inputs, task={zipped.names[0]!r})
```

Tasks:

{tasks}

Inputs, prepared as for the networks that were merged:

{inputs}{prepared}

## Report

{_block(str(report).strip())}
"""


def _origin(zipped: ZippedModel) -> str:
    """What it was made from, and what it costs, in words."""
    report, by = zipped.report, "without training by [fxzip](https://pypi.org/project/fxzip/)"
    ratio = f"{report.flops_after / report.flops_before:.1%}" if report.flops_before else "-"
    where, count = _text(report.where), len(report.before)
    if count == 1:
        return (
            f"A network for one task, made {by}:\na trunk and a head, {where}. It takes {ratio} of the "
            "floating-point\noperations that the network took which it was made from."
        )
    into = "a shared trunk and a head for each task" if len(zipped.names) > 1 else "one head that answers for all"
    return (
        f"{count} networks, merged {by} into one\nwith {into}, {where}. It takes {ratio} of the floating-point\n"
        "operations that they took together."
    )


def _classes(labels: Sequence[str]) -> str:
    """The names of a task's classes, not more than fit."""
    if not labels:
        return ""
    shown = ", ".join(map(_code, labels[:_SHOWN]))
    return f": {len(labels)} classes, {shown}{' ...' if len(labels) > _SHOWN else ''}"


def _text(value: str) -> str:
    """A string in running text: one line, no HTML, no Markdown."""
    return _MARKS.sub(r"\\\1", html.escape(" ".join(_UNSEEN.sub(" ", value).split()), quote=False))


def _fence(value: str, least: int) -> str:
    """More backticks than stand together anywhere in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", value))])


def _code(value: str) -> str:
    """A string as code within a line."""
    line = " ".join(_UNSEEN.sub(" ", value).split())
    fence = _fence(line, 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _block(value: str) -> str:
    """A text as a block of code that ends where the text does."""
    shown = _UNSEEN.sub(" ", value)
    fence = _fence(shown, 3)
    return f"{fence}text\n{shown}\n{fence}"
