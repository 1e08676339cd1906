"""The page: what it says, that it needs no other file, and that no name can break it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzip
from fxzip.errors import OptionError, SaveError
from fxzip.sweep import Sweep, SweepRow
from fxzip.views import page
from fxzip.views.page import fragment
from fxzip.views.page.facts import Facts
from tests.fxzip.served import hand_made, run_fresh
from tests.nets import Residual

pytest.importorskip("matplotlib", reason="the page's charts need matplotlib: pip install 'fxzip[report]'")
from fxzip.views.page.charts import spans

VOID = frozenset(("meta", "link", "br"))
SWEEP = Sweep(
    (
        SweepRow("zip", "layer2", 1.25, 1.5, {"dogs": 71.5, "birds": 80}),
        SweepRow("zip", "fc", 1.0, 1.0, {"dogs": 70.25, "birds": math.nan}),
        SweepRow("permute", "fc", 1.0, 1.0, {"dogs": 60, "birds": 61}),
    )
)


@pytest.fixture(scope="module")
def zipped() -> fxzip.ZippedModel:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    return fxzip.zip(Residual(5), Residual(7), [x], cut="layer2", names=("dogs", "birds"), progress=False)


@pytest.fixture(scope="module")
def text(zipped: fxzip.ZippedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "deep" / "m.html"
    assert zipped.report.to_html(path, sweep=SWEEP) == path
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects text, tables and addresses, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_says_what_the_report_says(zipped: fxzip.ZippedModel, text: str) -> None:
    read, report = Reader(text), zipped.report
    assert "dogs + birds" in read.text
    assert f"2 networks merged by {report.method}, cut at layer2" in read.text
    assert f"{100 * report.flops_after / report.flops_before:.0f}%" in read.text
    spaces = [row for row in read.rows if row[0] in {s.name for s in report.spaces} and len(row) == 5]
    assert [row[0] for row in spaces] == [row.name for row in report.spaces]
    assert [row[3] for row in spaces] == [f"{row.correlation:.3f}" for row in report.spaces]
    layers = [row for row in read.rows if len(row) == 7][1:]
    assert [row[0] for row in layers] == [row.name for row in report.layers if row.layer]
    assert {row[2] for row in layers} == {"trunk", "dogs", "birds"}
    assert all((row[3] == "own weights") == (row[2] != "trunk") for row in layers)


def test_graph_has_trunk_and_heads(text: str) -> None:
    read = Reader(text)
    boxes = re.findall(r'<li class="box"[^>]*>\s*<b>([^<]*)</b>', text)
    assert boxes[:3] == ["x", "stem", "layer1.conv1"]
    assert [name for name in boxes if name.startswith("output")] == ["output dogs", "output birds"]
    assert "Head dogs" in read.text
    assert "takes" in read.text  # the sum has two inputs


def test_charts(text: str) -> None:
    assert re.findall(r'<figure role="group" aria-label="([^"]*)"', text) == [
        "Matched correlation by depth",
        "What is lost by depth",
        "Where the operations are",
        "Scores over operations",
    ]
    read = Reader(text)
    assert read.tags.count("svg") == 4
    assert "layer of the trunk" in read.text  # text in the charts is text
    assert [row for row in read.rows if row[0] == "merge" or row[0].startswith(("zip,", "permute,"))] == [
        ["merge", "FLOPs", "parameters", "dogs", "birds"],
        ["zip, layer2", "1.25x", "1.50x", "71.5", "80"],
        ["zip, fc", "1.00x", "1.00x", "70.25", "nan"],
        ["permute, fc", "1.00x", "1.00x", "60", "61"],
    ]
    assert len(read.ids) == len(set(read.ids))


def test_needs_nothing_from_outside(text: str) -> None:
    read = Reader(text)
    assert [address for address in read.addresses if not address.startswith(("#", "data:,"))] == []
    assert not {"script", "iframe", "object", "embed", "img"} & set(read.tags)
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_without_a_sweep_there_is_no_chart_of_it(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    text = zipped.report.to_html(tmp_path / "m.html").read_text()
    assert "Scores over operations" not in text
    assert "Sweep" not in text


def test_spans_are_layers_of_the_trunk(zipped: fxzip.ZippedModel) -> None:
    found = spans(zipped.report)
    order = [row.name for row in zipped.report.layers if row.layer and not row.part]
    stem = next(space.name for space in zipped.report.spaces if space.name in zipped.report.layers[1].spaces)
    assert found[stem][0] == 1
    assert order[found[stem][1] - 1].startswith("layer1")
    assert all(1 <= first <= last <= len(order) for first, last in found.values())


def test_names_cannot_break_the_page(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    odd = "<script>alert('1')</script>&\"$x$"
    report = zipped.report
    report = replace(
        report,
        names=(odd, "b"),
        method=odd,
        cut=odd,
        parting=odd,
        frozen=(odd,),
        traced_by=(odd,),
        spaces=tuple(replace(row, name=odd + row.name) for row in report.spaces),
        layers=tuple(
            replace(
                row,
                name=odd + row.name if row.kind != "output" else row.name,
                part={"dogs": odd, "birds": "b", "": ""}[row.part],
                spaces=tuple(odd + name for name in row.spaces),
            )
            for row in report.layers
        ),
    )
    read = Reader(
        report.to_html(tmp_path / "m.html", sweep=Sweep((SweepRow(odd, odd, 1.0, 2.0, {odd: 3.0}),))).read_text()
    )
    assert "script" not in read.tags
    assert odd in read.text
    assert "script" not in Reader(fragment(report)).tags


def test_a_loaded_report_gives_the_same_page(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    again = fxzip.load(zipped.save(tmp_path / "saved"))
    pages = [net.report.to_html(tmp_path / "m.html").read_bytes() for net in (zipped, again)]
    assert pages[0] == pages[1]


# ---- reports that lack something


def test_report_without_outline_or_observation(tmp_path: Path) -> None:
    report = hand_made(nn.Linear(2, 2)).report
    read = Reader(report.to_html(tmp_path / "m.html").read_text())
    assert "The merged network" not in read.text
    assert read.tags.count("svg") == 0
    assert Facts.of(report).blocks == ()


def test_nan_is_not_shown_as_a_number(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    rows = tuple(replace(row, correlation=math.nan) for row in zipped.report.spaces)
    report = replace(zipped.report, spaces=rows)
    text = report.to_html(tmp_path / "m.html").read_text()
    assert "nan" not in Reader(text).text.lower().split()
    assert "Matched correlation by depth" not in text


def test_within_shares_are_weighted_by_channels(zipped: fxzip.ZippedModel) -> None:
    rows = zipped.report.spaces
    report = replace(zipped.report, spaces=tuple(replace(r, within=0.5 if r == rows[0] else 0.0) for r in rows))
    expected = 50 * rows[0].size / sum(row.size for row in rows)
    assert f"{expected:.1f}%" in {tile.value for tile in Facts.of(report).tiles}


# ---- notebooks


def test_notebook(zipped: fxzip.ZippedModel) -> None:
    text = zipped.report._repr_html_()
    read = Reader(text)
    assert not {"html", "head", "body", "title"} & set(read.tags)
    assert read.tags.count("svg") == 3
    # Nothing of its style may touch the rest of the notebook.
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    selectors = [part.split("{")[0].strip() for part in re.sub(r"@media[^{]*{", "", style).split("}")]
    single = [one.strip() for part in selectors if part for one in part.split(",")]
    assert [one for one in single if not one.startswith(".fxzip")] == []


def test_notebook_without_matplotlib(zipped: fxzip.ZippedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda _: None)
    read = Reader(zipped.report._repr_html_())
    assert "svg" not in read.tags
    assert "Channel spaces" in read.text


# ---- what goes wrong


def test_page_without_matplotlib(zipped: fxzip.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install 'fxzip\[report\]'"):
        zipped.report.to_html(tmp_path / "m.html")


def test_unwritable(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written to"):
        zipped.report.to_html(tmp_path / "file" / "m.html")


def test_matplotlib_is_not_imported_before() -> None:
    code = "import sys, fxzip.prepared, fxzip.views.page, fxzip.views.draw; print('matplotlib' in sys.modules)"
    assert run_fresh(code).split() == ["False"]
