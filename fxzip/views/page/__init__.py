"""The report as one HTML page that needs no other file, and as what a notebook shows.

`write_page` and `fragment` fill ``page.html.jinja``; the charts are drawn by matplotlib as inline SVG.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxzip.errors import OptionError
from fxzip.folders import write_file
from fxzip.report import Report
from fxzip.views.page.facts import Facts

if TYPE_CHECKING:
    from os import PathLike

    from jinja2 import Template

    from fxzip.sweep import Sweep


def write_page(report: Report, path: str | PathLike[str], *, sweep: Sweep | None = None) -> Path:
    """Write a report as a page: the merged graph, correlation by depth, where the operations are, tables.

        zipped.report.to_html("merged.html")

    Args:
        report: The report.
        path: The file; its folder is made where it is missing.
        sweep: What ``prepared.sweep`` gave: its scores over FLOPs are shown, too.

    Returns:
        The file.

    Raises:
        OptionError: matplotlib is not installed.
        SaveError: Nothing can be written there.
    """
    if not _has_matplotlib():
        raise OptionError("the page's charts need matplotlib: pip install 'fxzip[report]'")
    return write_file(Path(path), _render(report, sweep, whole=True).encode())


def fragment(report: Report) -> str:
    """The report as HTML for a notebook's cell; without matplotlib it has no charts."""
    return _render(report, None, whole=False)


def _render(report: Report, sweep: Sweep | None, whole: bool) -> str:
    facts = Facts.of(report)
    charts: list[Any] = []
    if _has_matplotlib():
        from fxzip.views.page.charts import charts_of

        charts = charts_of(report, facts, sweep)
    text: str = _template().render(
        report=report, facts=facts, charts=charts, sweep=sweep, whole=whole, made_by=_made_by()
    )
    return text


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files(__name__) / "page.html.jinja").read_text(encoding="utf-8"))


def _made_by() -> str:
    try:
        return f"fxzip {version('fxzip')}"
    except PackageNotFoundError:
        return "fxzip"
