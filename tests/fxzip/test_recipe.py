"""Recipes: options from YAML, and back."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from fxzip.errors import OptionError
from fxzip.recipe import read_recipe, write_recipe

KNOWN = {"model", "data", "checkpoints", "cut", "alpha", "refit", "names", "input_size", "options"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    options = {
        "model": "timm:resnet18",
        "checkpoints": ["a.pth", "hf-hub:me/birds", "local-dir:b"],
        "alpha": 0.5,
        "refit": False,
        "cut": None,
        "input_size": (3, 8, 8),
        "options": {"gamma": 0.5},
    }
    write_recipe(tmp_path / "r.yaml", options)
    found = read_recipe(tmp_path / "r.yaml", KNOWN)
    here = os.path.realpath(os.getcwd())
    assert found == {
        "model": "timm:resnet18",
        "checkpoints": [
            os.path.join(tmp_path, os.path.relpath(os.path.join(here, "a.pth"), tmp_path)),
            "hf-hub:me/birds",
            "local-dir:" + os.path.join(tmp_path, os.path.relpath(os.path.join(here, "b"), tmp_path)),
        ],
        "alpha": 0.5,
        "refit": False,
        "input_size": [3, 8, 8],
        "options": {"gamma": 0.5},
    }
    assert os.path.realpath(found["checkpoints"][0]) == os.path.join(here, "a.pth")


def test_paths_are_relative_to_the_recipe_and_survive_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "IMAGES").mkdir(parents=True)
    monkeypatch.chdir(project)
    write_recipe(tmp_path / "scratch.yaml", {"data": Path("IMAGES")}, beside=project / "merged")
    assert yaml.safe_load((tmp_path / "scratch.yaml").read_text()) == {"data": "../IMAGES"}
    (project / "merged").mkdir()
    (tmp_path / "scratch.yaml").rename(project / "merged" / "r.yaml")
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = read_recipe(tmp_path / "moved" / "merged" / "r.yaml", KNOWN)
    assert Path(found["data"]).resolve() == tmp_path / "moved" / "IMAGES"


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    write_recipe(tmp_path / "r.yaml", {"checkpoints": [str(tmp_path / "a.safetensors")]})
    assert yaml.safe_load((tmp_path / "r.yaml").read_text()) == {"checkpoints": ["a.safetensors"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cutt: layer3", "unknown option 'cutt'; did you mean cut"),
        ("- cut", "holds no options"),
        ("", "holds no options"),
        ("cut: [", "is not YAML"),
        ("cut: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("a: &a [x]\nb: [*a, *a]", "anchors and aliases are not read: line 1"),
        ("cut: " + "[" * 40 + "]" * 40, "nests deeper than 16"),
        ("cut: " + "[" * 5000, "nests deeper than 16"),
        ("alpha: 0x" + "f" * 10000, "a number of 10,002 digits: line 1"),
        ("alpha: " + "9" * 10000, "a number of 10,000 digits"),
        ("alpha: " + ":".join(["59"] * 1000), "a number of"),
        ("cut: layer3\ncut: layer4", "'cut' is given twice"),
        ("cut: 2026-99-99", "is not YAML of plain options"),
        ("cut: !!int {}", "is not YAML of plain options"),
        ("cut: !!int ''", "is not YAML of plain options"),
        ("? [a]\n: 1", "is not YAML of plain options"),
        ("cut: \x00", "is not YAML of plain options"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(OptionError, match=says):
        read_recipe(tmp_path / "r.yaml", KNOWN)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_recipe(tmp_path / "r.yaml", KNOWN)


def test_only_small_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "large").write_text("#" * (1 << 20) + "\ncut: layer3")
    for name, why in (("pipe", "not a regular file"), ("large", "more than the 262,144"), (".", "cannot be read")):
        with pytest.raises(OptionError, match=why):
            read_recipe(tmp_path / name, KNOWN)
    (tmp_path / "r.yaml").write_text("cut: layer3")
    (tmp_path / "link").symlink_to(tmp_path / "r.yaml")
    assert read_recipe(tmp_path / "link", KNOWN) == {"cut": "layer3"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge_method: ties", "fxzip has no 'ties'; it has linear, auto, zip"),
        ("merge_method: linear\nmethod: zip", "merge_method and method mean the same"),
        ("models: [a.pth, {model: b.pth, parameters: {weight: 0.3}}]", "the weights differ"),
        ("models: [{model: a.pth, parameters: {density: 0.5}}]", "density of a.pth means nothing in fxzip"),
        ("models: a.pth", "give a list of checkpoints"),
        ("models: [a.pth]\ncheckpoints: [a.pth]", "models and checkpoints mean the same"),
        ("models: [a.pth]\ndtype: bfloat16", "dtype: fxzip merges in the precision of the checkpoints"),
        ("models: [a.pth]\nbase_model: c.pth", "starts from no base"),
        ("models: [a.pth]\nparameters: {t: 0.5}", "fxzip knows `normalize: true` only"),
    ],
)
def test_what_of_mergekit_means_nothing_here(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(OptionError, match=re.escape(says)):
        read_recipe(tmp_path / "r.yaml")


def test_models_of_mergekit_are_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("models: [a.pth, {model: hf-hub:me/b}]\nmerge_method: select\n")
    assert read_recipe(tmp_path / "r.yaml") == {
        "checkpoints": [str(tmp_path / "a.pth"), "hf-hub:me/b"],
        "method": "select",
    }
    (tmp_path / "r.yaml").write_text("models: [a.pth, b.pth]\nmerge_method: linear\nrefit: true")
    assert read_recipe(tmp_path / "r.yaml")["refit"] is True
