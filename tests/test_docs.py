"""The docs: every guide's code runs and does what its text says, and no table stands there by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fxzip
from benchmarks.lib import tables

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
API = ROOT / "docs" / "api"
pytestmark = pytest.mark.slow
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("digits", "run"))


@pytest.fixture(scope="module")
def runner() -> Iterator[ModuleType]:
    """docs/examples/run.py, with the folder of the examples where they look for digits.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("run")
    for name in ("run", "digits"):
        sys.modules.pop(name, None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples write into the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(request: pytest.FixtureRequest, runner: ModuleType, here: Path) -> dict[str, Any]:
    """The names at the end of the example that a test is marked with; what it printed is under ``printed``."""
    name = request.node.get_closest_marker("example").args[0]
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'fxzip[demo]'")
    outputs, names = runner.run(EXAMPLES / f"{name}.py")
    kept = json.loads(runner.OUTPUTS.read_text(encoding="utf-8"))[name]
    assert [bool(text) for text in outputs] == [bool(text) for text in kept], "run docs/examples/run.py again"
    return {**names, "printed": outputs}


@pytest.mark.example("timm_models")
def test_timm_models(ran: dict[str, Any]) -> None:
    assert min(ran["kept"].values()) > 80
    assert ran["again"].names == ("low", "high")
    assert "cut at" in ran["printed"][2]


@pytest.mark.example("pick_the_cut")
@pytest.mark.timeout(900)
def test_pick_the_cut(ran: dict[str, Any], here: Path) -> None:
    rows = {(row.method, row.cut): row for row in ran["sweep"].rows}
    assert len(rows) == 4
    assert all(row.scores["agreement"] > 50 for row in rows.values())
    assert "agreement" in ran["printed"][3]
    assert ran["best"].flops <= 1.5
    assert ran["ratio"] <= 1.51
    assert "Scores over operations" in (here / "cut.html").read_text()


@pytest.mark.example("widths")
def test_widths(ran: dict[str, Any]) -> None:
    report = ran["zipped"].report
    assert 1.0 < len(report.before) * report.flops_after / report.flops_before <= 1.2
    assert any(row.merged for row in report.spaces)
    small = ran["small"].report
    assert small.flops_after <= 0.5 * small.flops_before
    assert small.fidelity.unexplained < 0.1
    assert ran["logits"].shape[1] == 5


@pytest.mark.example("many_models")
def test_many_models(ran: dict[str, Any]) -> None:
    assert len({ran["first"].shape, ran["second"].shape, ran["third"].shape}) == 1
    costs = [ran[name].report.flops_after / ran[name].report.flops_before for name in ("zipped", "full")]
    assert costs[1] == pytest.approx(1 / 3, abs=0.01)  # "about a third"
    assert costs[1] < costs[0] < 1
    assert min(ran["kept"].values()) > 80


@pytest.mark.example("after_the_merge")
def test_after_the_merge(ran: dict[str, Any], here: Path) -> None:
    assert ran["same"]
    assert ran["shared"]
    assert {path.name for path in (here / "checkpoints").iterdir()} == {"low.safetensors", "high.safetensors"}
    assert min(ran["after"].values()) >= min(ran["before"].values()) - 0.5
    assert sum(ran["after"].values()) >= sum(ran["before"].values())
    assert ran["only"].report.names == ("low",)
    assert ran["three"].names == ("low", "high", "middle")
    assert min(ran["kept"].values()) > 80
    assert {found[0].label for found in ran["best"].values()} <= set("0123456789")


@pytest.mark.example("own_architecture")
def test_own_architecture(ran: dict[str, Any]) -> None:
    from fxzip.rules.registry import unregister_rule

    unregister_rule(ran["torch"].ops.mine.scaled_relu.default)
    unregister_rule(ran["torch"].ops.mine.dense.default)
    assert ran["difference"] < 1e-10
    assert ran["error"] < 1e-4
    assert ran["missed"] == []
    assert [space.size for space in ran["spec"].spaces] == [24]  # stem, value and gate share one
    assert min(ran["kept"].values()) > 80
    assert any("scaled_relu" in str(warning.message) for warning in ran["caught"])
    assert {row.name for row in ran["before"].frozen} == {"stem", "scale"}
    assert not ran["after"].frozen
    assert ran["after"].coverage > ran["before"].coverage
    assert ran["own"].report.refitted == 3  # the stem, and the layer of each head


@pytest.mark.example("fine_tunes")
def test_fine_tunes(ran: dict[str, Any]) -> None:
    assert any("average" in tried for tried in ran["zipped"].report.tried)
    assert all(after > before - 5 for before, after in ran["kept"].values())
    assert ran["one"] > min(ran["alone"]) - 3
    assert ran["fused"].names == ("joint",)


@pytest.mark.example("several_detectors")
def test_several_detectors(ran: dict[str, Any], here: Path) -> None:
    assert ran["shared"]
    assert ran["same"]
    assert sorted(ran["found"][0]) == ["boxes", "labels", "scores"]
    assert ran["merged"].zipped.report.flops_after < 0.7 * ran["merged"].zipped.report.flops_before
    assert (here / "backbone" / "fxzip.json").exists()


@pytest.mark.example("export_and_serve")
def test_export_and_serve(ran: dict[str, Any]) -> None:
    assert ran["same"]
    assert ran["difference"] < 1e-3
    assert ran["low"].shape == (7, 5)
    assert [tuple(x.shape) for x in ran["outputs"]] == [(3, 5), (3, 5)]
    assert (ran["folder"] / "low.onnx").exists()
    for name in ("dynamic", "static"):
        assert ran["kept"][name]["kB"] < ran["kept"]["merged"]["kB"] / 3
        assert all(ran["kept"][name][task] > ran["kept"]["merged"][task] - 3 for task in ("low", "high"))


@pytest.mark.example("report_and_drawing")
def test_report_and_drawing(ran: dict[str, Any], here: Path) -> None:
    assert ran["page"].read_text().startswith("<!doctype html>")
    assert ran["picture"].exists()
    assert ran["text"].startswith("flowchart")


def test_every_guide_has_a_test_and_a_place_in_the_navigation() -> None:
    tested = {name for name in NAMES if f'@pytest.mark.example("{name}")' in Path(__file__).read_text()}
    assert tested == set(NAMES)
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in NAMES if f"guides/{name}.md" not in navigation] == []


# ---- the API


@pytest.fixture(scope="module")
def api_tables() -> Iterator[ModuleType]:
    """docs/api_tables.py."""
    pytest.importorskip("griffe", reason="docstrings are read by griffe: pip install 'fxzip[docs]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("api_tables")
    sys.modules.pop("api_tables", None)


def test_every_public_name_is_on_one_page_of_the_api(api_tables: ModuleType) -> None:
    pages = [path.stem for path in API.glob("*.md") if path.stem != "index"]
    names = [name for page in pages for name in api_tables.documented(page)]
    assert sorted(names) == sorted(set(names))
    assert [name for name in fxzip.__all__ if f"fxzip.{name}" not in names] == []
    assert [name for name in fxzip.testing.__all__ if f"fxzip.testing.{name}" not in names] == []


def test_the_tables_of_the_api(api_tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = api_tables.fill_api("before <!-- api: errors --> after")
    assert "| [`fxzip.CutError`][fxzip.CutError] | The cut is unknown, or no trunk would be left before it. |" in text
    monkeypatch.setattr(api_tables, "DOCS", tmp_path)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "one.md").write_text("# One\n\n::: fxzip.testing\n\n::: fxzip.testing.TOLERANCE\n")
    assert list(api_tables.documented("one")) == ["fxzip.testing.TOLERANCE"]
    (tmp_path / "api" / "one.md").write_text("::: fxzip.zip\n::: fxzip.zip\n")
    with pytest.raises(ValueError, match="twice"):
        api_tables.table("one")


def test_the_overview_and_the_navigation_have_every_page_of_the_api() -> None:
    overview, navigation = (API / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for path in API.glob("*.md"):
        assert f"api/{path.name}\n" in navigation
        if path.stem != "index":
            assert f"]({path.name})" in overview
            assert f"<!-- api: {path.stem} -->" in overview


# ---- tables


def test_the_readme_has_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python -m benchmarks.tables"


def test_pages_hold_no_tables_of_numbers() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        if path.name in ("zoo.md", "zoo_all.md"):  # written by benchmarks.zoo
            continue
        text = path.read_text(encoding="utf-8")
        for match in tables.MARKED.finditer(text):
            assert "|" not in match[0], f"{path.name}: {match['name']} is filled in when the docs are built"


def test_every_file_of_results_becomes_a_table() -> None:
    found = sorted(tables.RESULTS.glob("*.json"))
    assert found
    for path in found:
        for rows in tables.rows_of(json.loads(path.read_text(encoding="utf-8"))).values():
            lines = tables.plain(rows).splitlines()
            assert len(lines) == len(rows) + 2
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_rows_of_any_file() -> None:
    rows = [{"a": 1}]
    assert tables.rows_of(rows) == {"": rows}
    assert tables.rows_of({"rows": rows, "versions": {}}) == {"": rows}
    assert tables.rows_of({"pairs": {"vit": rows, "gpt": rows}, "sizes": [1, 2]}) == {"vit": rows, "gpt": rows}


def test_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [{"name": "a|b", "time_s": 0.12345, "peak_bytes": 2**21, "same": True, "range": [1.0, 2.5]}, {"name": "c"}]
    (tmp_path / "one_x.json").write_text(json.dumps({"command": "do it", "threads": 1, "rows": rows}))
    text = "before <!-- table: one_* -->old<!-- end --> between <!-- table: two --><!-- end --> after"
    filled = tables.fill(text, sources=True)
    assert "| name | time, s | peak, MiB | same | range |" in filled
    assert "| a\\|b | 0.123 | 2 | yes | 1 - 2.5 |" in filled
    assert "| c | - | - | - | - |" in filled
    assert "`do it`, `one_x.json`, 1 thread" in filled
    assert "Not measured yet: `python -m benchmarks.two`" in filled
    assert "old" not in filled
    assert tables.fill(filled, sources=True) == filled
