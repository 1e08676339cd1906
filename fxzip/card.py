"""The model card of a saved network: Markdown in which every name and text stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from fxzip.origins import one_licence

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from fxzip.merged import ZippedModel

TAGS = ("fxzip", "merge", "model-merging", "pytorch")

_MARKS = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$^=/])")
_SHOWN = 20
"""The most names of classes that a card lists."""
_UNSEEN = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def model_card(zipped: ZippedModel) -> str:
    """A README in Markdown with the hub's metadata, the tasks, how to load the network, the report and the recipe."""
    report = zipped.report
    inputs = "\n".join(f"- {_code(str(node.target))}" for node in zipped.trunk.graph.find_nodes(op="placeholder"))
    labels = {name: zipped.labels.get(name, ()) for name in zipped.names}
    tasks = "\n".join(f"- {_code(name)}{_classes(found)}" for name, found in labels.items())
    config = zipped.information.preparation.config
    prepared = "".join(f"\n- {_text(key)}: {_code(str(value))}" for key, value in config.items())
    return f"""---
{_metadata(zipped)}
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
{_made_from(zipped)}
## Report

{_block(str(report).strip(), "text")}

## Recipe

{_block(_recipe(zipped), "yaml")}
"""


def _metadata(zipped: ZippedModel) -> str:
    """What the hub reads: base models, licence, data sets, fidelity as results, tags."""
    from huggingface_hub import ModelCardData

    origins = zipped.information.origins.values()
    models = sorted({origin.model for origin in origins if origin.model})
    datasets = sorted({_line(name) for origin in origins for name in origin.datasets})
    licence, results = one_licence(origins), _results(zipped)
    data = ModelCardData(
        library_name="fxzip",
        model_name=" + ".join(zipped.names),
        license=None if licence is None else _line(licence),
        license_name="as-of-the-merged-networks" if licence == "other" else None,
        base_model=models or None,
        base_model_relation="merge" if models else None,
        datasets=datasets or None,
        eval_results=results or None,
        metrics=sorted({each.metric_type for each in results}) or None,
        pipeline_tag="image-classification" if _names_images(zipped) else None,
        tags=list(TAGS),
    )
    return data.to_yaml().strip()


def _names_images(zipped: ZippedModel) -> bool:
    """Whether every head names the class of an image."""
    return zipped.information.preparation.mean is not None and set(zipped.labels) == set(zipped.names)


def _results(zipped: ZippedModel) -> list[EvalResult]:
    """The fidelity of each head to its parent, as results on the images that were held back."""
    from huggingface_hub import EvalResult

    fidelity = zipped.report.fidelity
    if fidelity is None:
        return []
    found = []
    for answer in fidelity.answers:
        values = {"agreement": answer.agreement, "kl": answer.kl, "unexplained": answer.unexplained}
        for kind, value in values.items():
            if value is not None and abs(value) < float("inf"):
                about: dict[str, Any] = {
                    "task_type": "image-classification" if _names_images(zipped) else "other",
                    "task_name": _line(f"fidelity of {answer.task}{answer.output} to its parent"),
                    "dataset_type": "held-back",
                    "dataset_config": _line(f"{answer.task}{answer.output}"),
                    "dataset_name": f"{fidelity.images:,} images that the fit did not see",
                    "metric_type": kind,
                    "metric_name": _METRICS[kind],
                    "metric_value": round(value, 5),
                }
                found.append(EvalResult(**about))
    return found


_METRICS = {
    "agreement": "share of images with the parent's class first",
    "kl": "KL divergence from the parent's probabilities, in nats",
    "unexplained": "unexplained share of the parent's outputs",
}


def _made_from(zipped: ZippedModel) -> str:
    """Where the merged networks came from, and their licences."""
    origins = zipped.information.origins
    if not origins:
        return ""
    rows = []
    for name, origin in origins.items():
        parts = [_code(origin.model)] if origin.model else []
        parts += [f"licence {_code(origin.licence)}"] if origin.licence else []
        parts += [f"trained on {', '.join(map(_code, origin.datasets))}"] if origin.datasets else []
        rows.append(f"- {_code(name)}: {', '.join(parts) or 'not known'}")
    kept = "\n\nUse it as all of these licences allow." if one_licence(origins.values()) == "other" else ""
    return "\nMade from:\n\n" + "\n".join(rows) + kept + "\n"


def _recipe(zipped: ZippedModel) -> str:
    """How it was merged, in the words of fxzip's recipes."""
    report = zipped.report
    said = {"names": list(report.names), "method": report.method, "cut": report.cut, "start": report.start}
    said |= {"width": report.width}
    kept = {key: value for key, value in said.items() if value is not None}
    return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=None)).strip()


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


def _line(value: str) -> str:
    """A string as one line, without what cannot be seen."""
    return " ".join(_UNSEEN.sub(" ", value).split())


def _text(value: str) -> str:
    """A string in running text: one line, no HTML, no Markdown."""
    return _MARKS.sub(r"\\\1", html.escape(_line(value), quote=False))


def _fence(value: str, least: int) -> str:
    """More backticks than stand together anywhere in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", value))])


def _code(value: str) -> str:
    """A string as code within a line."""
    line = _line(value)
    fence = _fence(line, 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _block(value: str, kind: str) -> str:
    """A text as a block of code that ends where the text does."""
    shown = _UNSEEN.sub(" ", value)
    fence = _fence(shown, 3)
    return f"{fence}{kind}\n{shown}\n{fence}"
