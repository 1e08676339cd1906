"""The pictures of README.md and the docs, from two networks of the digits: ``python docs/make_pictures.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "examples"))

from digits import HALVES, digit_net, digits, fit, joint, loader

import fxzip
from fxzip.views.page.charts import charts_of
from fxzip.views.page.facts import Facts

CUTS = ["layer1", "layer2", "layer3", None]
METHODS = [
    {"method": "permute", "refit": False, "name": "permute, paper's rule"},
    {"method": "zip", "refit": False, "name": "zip, paper's rule"},
    {"method": "zip", "name": "zip + refit"},
]


def main() -> None:
    """Draw all of them into docs/pictures."""
    torch.set_num_threads(1)
    out = HERE / "pictures"
    models = [fit(digit_net, classes, epochs=10) for classes in HALVES.values()]
    prepared = fxzip.prepare(*models, example_inputs=digits().test.tensors[0][:2], names=tuple(HALVES))
    prepared.observe(loader(), progress=False)
    sweep = prepared.sweep(CUTS, METHODS, lambda zipped: {"joint": joint(zipped)}, progress=False)
    zipped = prepared.convert(cut="layer3", method="zip", progress=False)
    zipped.draw(out / "merged.svg")
    zipped.report.to_html(out / "merged.html", sweep=sweep)
    facts = Facts.of(zipped.report)
    names = ("correlation", "fidelity", "operations", "sweep")
    for name, chart in zip(names, charts_of(zipped.report, facts, sweep), strict=True):
        (out / f"{name}.svg").write_text(standalone(chart.svg), encoding="utf-8")


def standalone(svg: str) -> str:
    """A chart of the page as a file: on white, since the text is dark, in a font that any viewer has."""
    style = "<style>svg{background:#fff} text{font-family:Helvetica,Arial,sans-serif !important}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + style + svg[start:]


if __name__ == "__main__":
    main()
