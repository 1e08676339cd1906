"""Drawings: Graphviz where it is, Mermaid text where it is not, and names that could break either."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fxzip
from fxzip.errors import OptionError, SaveError
from fxzip.report import LayerRow, Report
from fxzip.views import drawable
from fxzip.views.draw import draw, mermaid
from fxzip.views.style import INK, PALETTE, PLAIN, flops_text, quantity
from tests.fxzip.served import NETWORKS, hand_made

pytest.importorskip("pydot", reason="drawings need pydot: pip install 'fxzip[report]'")
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz here: apt-get install graphviz")

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def zipped() -> fxzip.ZippedModel:
    torch.manual_seed(0)
    make, _, size = NETWORKS["resnet18"]
    models = [make(), make()]
    x = torch.randn(4, 3, size, size)
    return fxzip.zip(*models, [x], cut="layer4", names=("dogs", "birds"), refit=False, progress=False)


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter(f"{SVG}text")]


# ---- Graphviz


@needs_dot
def test_svg_of_resnet18_can_be_read(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    path = zipped.draw(tmp_path / "m.svg")
    assert path == tmp_path / "m.svg"
    found = texts(path)
    for wanted in ("trunk", "head: dogs", "head: birds", "conv1", "layer1.0", "layer3.1", "layer4.0", "fc", "dogs"):
        assert wanted in found, wanted
    root = ElementTree.parse(path).getroot()
    boxes = [g for g in root.iter(f"{SVG}g") if g.get("class") == "node"]
    assert len(boxes) == 8 + 2 * 4  # x, conv1, six blocks; two blocks, fc and output for each task
    width, height = (float(root.get(name).removesuffix("pt")) for name in ("width", "height"))
    assert width < 800
    assert height < 1100
    sizes = {float(element.get("font-size")) for element in root.iter(f"{SVG}text")}
    assert min(sizes) >= 11


@needs_dot
def test_spaces_have_colours_and_heads_have_none(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    fills = {}
    for group in ElementTree.parse(zipped.draw(tmp_path / "m.svg")).iter(f"{SVG}g"):
        if group.get("class") == "node":
            fills[group.find(f"{SVG}text").text] = group.find(f"{SVG}path").get("fill")
    assert fills["conv1"] == fills["layer1.0"] == fills["layer1.1"]  # one residual stage is one space
    assert len({fills[f"layer{stage}.0"] for stage in (1, 2, 3)}) == 3
    assert fills["layer4.0"] == fills["fc"] == PLAIN.tint


@needs_dot
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_other_formats(zipped: fxzip.ZippedModel, tmp_path: Path, suffix: str, start: bytes) -> None:
    assert zipped.draw(tmp_path / f"m{suffix}").read_bytes().startswith(start)


@needs_dot
def test_names_are_shown_as_they_are(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    odd = 'a"b\\n<i>&"]--x#;%{'
    assert odd in texts(draw(renamed(zipped.report, odd), tmp_path / "odd.svg"))


@needs_dot
def test_a_loaded_network_draws_the_same(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    again = fxzip.load(zipped.save(tmp_path / "saved"))
    assert again.draw(tmp_path / "b.svg").read_bytes() == zipped.draw(tmp_path / "a.svg").read_bytes()


@needs_dot
def test_a_failing_graphviz_leaves_no_file(
    zipped: fxzip.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dot").write_text("#!/bin/sh\nexit 1\n")
    (folder / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    with pytest.raises(SaveError, match="Graphviz could not draw"):
        zipped.draw(tmp_path / "m.svg")
    assert not (tmp_path / "m.svg").exists()


def test_dot_needs_no_graphviz(zipped: fxzip.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawable.shutil, "which", lambda _: None)
    text = zipped.draw(tmp_path / "m.dot").read_text()
    assert text.startswith("digraph")
    assert text.count("->") >= 12


# ---- SVG without Graphviz


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawable.shutil, "which", lambda _: None)


def drawn(path: Path) -> tuple[ElementTree.Element, dict[str, ElementTree.Element]]:
    """The picture, and its boxes by their first line."""
    root = ElementTree.parse(path).getroot()
    boxes = [g for g in root.iter(f"{SVG}g") if g.get("class") == "node"]
    return root, {g.find(f"{SVG}text").text or "": g for g in boxes}


@pytest.mark.usefixtures("own")
def test_svg_is_drawn_without_graphviz(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    path = zipped.draw(tmp_path / "m.svg")
    assert path == tmp_path / "m.svg"
    found = texts(path)
    for wanted in ("trunk", "head: dogs", "head: birds", "conv1", "layer1.0", "layer3.1", "layer4.0", "fc", "dogs"):
        assert wanted in found, wanted
    root, boxes = drawn(path)
    edges = re.findall(r"n\d+ --> n\d+", mermaid(zipped.report))
    assert len([p for p in root.iter(f"{SVG}path") if p.get("marker-end")]) == len(edges)
    fills = {name: box.find(f"{SVG}rect").get("fill") for name, box in boxes.items()}
    assert fills["conv1"] == fills["layer1.0"] == fills["layer1.1"]
    assert fills["layer4.0"] == fills["fc"] == PLAIN.tint
    assert (float(root.get("width")), float(root.get("height"))) < (800.0, 1200.0)


@pytest.mark.usefixtures("own")
def test_boxes_do_not_overlap_and_lie_in_their_frames(tmp_path: Path) -> None:
    """Also where branches lie side by side, and where lines pass rows by."""
    rows = [LayerRow("x", "input", "", False, (), (), (3, 8, 8), 0, 0)]
    for i, inputs in enumerate([(0,), (0,), (0,), (1, 2), (3, 4), (0, 5), (1, 6)]):
        rows.append(LayerRow(f"b{i}", "Conv2d", "", True, inputs, (), (4, 8, 8), 10, 100))
    for task in ("dogs", "birds"):
        rows.append(LayerRow("fc", "Linear", task, True, (7, 4), (), (5,), 10, 100))
        rows.append(LayerRow("output", "output", task, False, (len(rows) - 1,), (), (5,), 0, 0))
    report = replace(hand_made(nn.Sequential(nn.Linear(2, 2))).report, names=("dogs", "birds"), layers=tuple(rows))
    root, _ = drawn(draw(report, tmp_path / "m.svg"))

    def places(kind: str) -> list[tuple[float, float, float, float]]:
        groups = [g.find(f"{SVG}rect") for g in root.iter(f"{SVG}g") if g.get("class") == kind]
        sides = [[float(rect.get(key)) for key in ("x", "y", "width", "height")] for rect in groups]
        return [(x, y, x + width, y + height) for x, y, width, height in sides]

    boxes, frames = places("node"), places("cluster")
    assert (len(boxes), len(frames)) == (12, 3)
    for number, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        assert sum(f[0] < left and f[1] < top and right < f[2] and bottom < f[3] for f in frames) == 1


@pytest.mark.usefixtures("own")
def test_names_are_shown_as_they_are_without_graphviz(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    odd = 'a"b\\n<i>&"]--x#;%{'
    assert odd in texts(draw(renamed(zipped.report, odd), tmp_path / "odd.svg"))


# ---- Mermaid


def test_without_graphviz_a_picture_becomes_mermaid_text(
    zipped: fxzip.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawable.shutil, "which", lambda _: None)
    with pytest.warns(UserWarning, match="Graphviz") as caught:
        path = zipped.draw(tmp_path / "m.png")
    assert path == tmp_path / "m.mmd"
    assert path.read_text() == mermaid(zipped.report)
    assert [p.name for p in tmp_path.iterdir()] == ["m.mmd"]
    assert len(caught) == 1


def test_without_pydot(zipped: fxzip.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawable.importlib.util, "find_spec", lambda _: None)
    with pytest.warns(UserWarning, match=r"fxzip\[report\]"):
        assert zipped.draw(tmp_path / "m.png").suffix == ".mmd"
    with pytest.raises(OptionError, match=r"fxzip\[report\].*\.mmd"):
        zipped.draw(tmp_path / "m.dot")


def test_mermaid_has_every_box_and_every_edge(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    text = zipped.draw(tmp_path / "m.mmd").read_text()
    lines = text.splitlines()
    assert lines[0] == "flowchart TD"
    boxes = re.findall(r'^    (n\d+)\(?\["[^"\n]*"\]\)?$', text, re.MULTILINE)
    edges = re.findall(r"^  (n\d+) --> (n\d+)$", text, re.MULTILINE)
    assert len(boxes) == len(set(boxes)) == 16
    assert {name for edge in edges for name in edge} == set(boxes)
    assert len(edges) == 15  # a chain, and from its end two more
    parts = re.findall(r'subgraph part\d\["([^"]+)"\]', text)
    assert parts == ["trunk", "head: dogs", "head: birds"]
    assert text.count("\n  end\n") == 3
    painted = [name for group in re.findall(r"^  class (\S+) c\d+$", text, re.MULTILINE) for name in group.split(",")]
    assert sorted(painted) == sorted(boxes)
    known = [
        r"flowchart TD", r"  subgraph .*", r"  end", r'    n\d+\(?\[".*"\]\)?', r"  n\d+ --> n\d+",
        rf"  classDef c\d+ fill:#\w{{6}},stroke:#\w{{6}},color:{INK}", r"  class [n\d,]+ c\d+",
    ]  # fmt: skip
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in known)] == []


def test_mermaid_escapes_names(zipped: fxzip.ZippedModel) -> None:
    text = mermaid(renamed(zipped.report, 'a"b<i>&]#;`'))
    (line,) = [line for line in text.splitlines() if line.startswith("    n1[")]
    assert line.startswith('    n1["a#34;b#60;i#62;#38;#93;#35;#59;#96;<br/>')


def test_matches_within_and_across_are_told(zipped: fxzip.ZippedModel) -> None:
    spaces = tuple(replace(row, within=0.25 if row.name == "conv1" else 0.0) for row in zipped.report.spaces)
    lines = mermaid(replace(zipped.report, spaces=spaces)).splitlines()
    assert "25.0% within" in next(line for line in lines if "conv1" in line)
    assert "across" in next(line for line in lines if "layer2.0" in line)
    assert not any("across" in line or "within" in line for line in lines if "layer4" in line)


# ---- what goes wrong


@pytest.mark.parametrize("name", ["m.jpg", "m", "m.svg.txt"])
def test_unknown_suffix(zipped: fxzip.ZippedModel, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"must end in \.svg"):
        zipped.draw(tmp_path / name)


def test_a_report_without_outline(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no outline"):
        hand_made(nn.Linear(2, 2)).draw(tmp_path / "m.mmd")


def test_a_folder_is_no_file(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    (tmp_path / "m.mmd").mkdir()
    with pytest.raises(SaveError, match="is a folder"):
        zipped.draw(tmp_path / "m.mmd")


def test_a_file_is_no_folder(zipped: fxzip.ZippedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written to"):
        zipped.draw(tmp_path / "file" / "m.mmd")


def renamed(report: Report, name: str) -> Report:
    """The first layer called otherwise."""

    def rename(row: LayerRow) -> LayerRow:
        return replace(row, name=name) if row.name == "conv1" else row

    return replace(report, layers=tuple(map(rename, report.layers)))


# ---- numbers and colours


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (999.6, "1.00 k"), (1234, "1.23 k"), (99_960, "100 k"), (4.56e6, "4.56 M"),
     (45.6e6, "45.6 M"), (999_999_999, "1.00 G"), (1.8e9, "1.80 G"), (2.5e12, "2.50 T")],
)  # fmt: skip
def test_quantity(value: float, text: str) -> None:
    assert quantity(value) == text


def test_flops_text() -> None:
    assert [flops_text(value) for value in (12, 3400)] == ["12 FLOPs", "3.40 kFLOPs"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(left: str, right: str) -> float:
    low, high = sorted((luminance(left), luminance(right)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [*PALETTE, PLAIN])
def test_contrast(colour: object) -> None:
    assert contrast(colour.tint, INK) >= 12
    assert contrast(colour.stroke, "#ffffff") >= 4.5
