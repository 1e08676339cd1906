"""The command line on two tiny networks of timm: what it writes, and how it complains."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import fxzip
from fxzip import cli, io, prepared
from fxzip.cli import parameters
from fxzip.data.groups import find_images
from fxzip.data.images import ImageLoader
from fxzip.errors import FrozenSpaceWarning, OptionError
from fxzip.matching import chosen_options
from fxzip.settings import EFFORTS, MATCHING, refit_settings
from fxzip.views import drawable
from fxzip.zoo import data_config, load, transform

NAME = "timm:test_resnet"
CLASSES = {"dogs": 3, "birds": 4}
SIZE = ("--input-size", "3,32,32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, IMAGES/task/class/*.png, and the network that they make: merged/."""
    folder = tmp_path_factory.mktemp("cli")
    noise = np.random.default_rng(0)
    for seed, (task, classes) in enumerate(CLASSES.items()):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=classes)
        save_file(model.state_dict(), folder / f"{task}.safetensors")
        for label in range(classes):
            where = folder / "IMAGES" / task / f"class{label}"
            where.mkdir(parents=True)
            for number in range(4):
                pixels = noise.integers(0, 255, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{number}.png")
    done = run(*zip_arguments(folder, folder / "merged"))
    assert done.exit_code == 0, done.output
    return folder


def zip_arguments(place: Path, out: Path, *more: object, tasks: Sequence[str] = ("dogs", "birds")) -> list[object]:
    files = [place / f"{task}.safetensors" for task in tasks]
    fixed = ["--model", NAME, *files, "--data", place / "IMAGES", *SIZE, "--out", out, "--quiet"]
    return ["zip", *fixed, "--cut", "layer3", "--method", "zip", *more]


def one_line(done: Result, status: int = 1) -> str:
    assert done.exit_code == status, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("fxzip: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


# ---- what the commands do


def test_zip_is_what_the_library_does(place: Path) -> None:
    models = [load(NAME, place / f"{task}.safetensors") for task in CLASSES]
    config = data_config(models[0], input_size=(3, 32, 32))
    loader = ImageLoader(find_images(place / "IMAGES").values(), transform(config))
    ours = fxzip.zip(*models, loader=loader, cut="layer3", method="zip", names=tuple(CLASSES), progress=False)
    saved = fxzip.load(place / "merged")
    assert saved.names == ("dogs", "birds")
    assert str(saved.report) == str(ours.report)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), saved.state_dict().values(), strict=True))


def test_recipe_beside_the_network_makes_it_again(place: Path, tmp_path: Path) -> None:
    recipe = place / "merged" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert values["checkpoints"] == ["../dogs.safetensors", "../birds.safetensors"]
    assert values["data"] == "../IMAGES"
    assert values["input_size"] == [3, 32, 32]
    assert values["mean"] == list(timm.create_model("test_resnet").pretrained_cfg["mean"])
    assert (values["method"], values["alpha"], values["beta"]) == ("zip", *chosen_options("zip", {}).values())
    done = run("zip", "--recipe", recipe, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert "dogs + birds" in done.stdout
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (place / "merged", tmp_path / "again"))
    assert first == second


def test_one_answer_from_all(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "cats.safetensors"
    shutil.copy(place / "dogs.safetensors", other)
    fixed = ["--model", NAME, place / "dogs.safetensors", other, "--data", place / "IMAGES", *SIZE, "--quiet"]
    done = run("zip", *fixed, "--heads", "mean", "--no-refit", "--out", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert fxzip.load(tmp_path / "one").names == ("joint",)
    again = run("zip", "--recipe", tmp_path / "one" / "recipe.yaml", "--quiet", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert fxzip.load(tmp_path / "again").names == ("joint",)
    both = ["--model", NAME, place / "dogs.safetensors", place / "birds.safetensors", "--data", place / "IMAGES", *SIZE]
    done = run("zip", *both, "--heads", "concat", "--no-refit", "--quiet", "--out", tmp_path / "all")
    assert done.exit_code == 0, done.output
    classes = tuple(f"class{label}" for count in CLASSES.values() for label in range(count))
    assert fxzip.load(tmp_path / "all").labels == {"joint": classes}
    assert "heads='sum'" in one_line(run("zip", *fixed, "--heads", "sum", "--out", tmp_path / "none"))


def test_command_line_comes_before_the_recipe(place: Path, tmp_path: Path) -> None:
    own = {
        "model": NAME,
        "checkpoints": [str(place / "dogs.safetensors"), str(place / "birds.safetensors")],
        "data": str(place / "IMAGES"),
        "input_size": [3, 32, 32],
        "cut": "layer2",
        "method": "zip",
        "alpha": 0.25,
        "refit": False,
        "names": ["a", "b"],
        "model_args": {"drop_rate": 0.5},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(own))
    done = run("zip", "--recipe", tmp_path / "r.yaml", "--cut", "layer3", "--quiet", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    report = fxzip.load(tmp_path / "out").report
    assert report.names == ("a", "b")
    assert report.cut == "layer3"
    assert report.refitted == 0
    assert "alpha=0.25" in report.method
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["model_args"] == {"drop_rate": 0.5}
    assert written["cut"] == "layer3"


def test_every_effort_is_one_of_the_command() -> None:
    assert get_args(parameters.Effort.__origin__) == tuple(EFFORTS)


def test_every_option_of_the_function_is_one_of_the_command() -> None:
    command: Any = typer.main.get_command(cli.app)
    given = {"models", "model", "loader", "progress", "name", "process_group", "part"}
    for function in (fxzip.zip, fxzip.shrink):
        wanted = set(inspect.signature(function).parameters) - given
        assert wanted <= {param.name for param in command.commands[function.__name__].params}


def test_widths_and_budgets(place: Path, tmp_path: Path) -> None:
    done = run(*zip_arguments(place, tmp_path / "out", "--width", "layer1=1.5", "--width", "layer2=0.5"))
    assert done.exit_code == 0, done.output
    report = fxzip.load(tmp_path / "out").report
    sizes = {row.name: (row.size, row.merged) for row in report.spaces}
    assert any(merged == 1.5 * size for size, merged in sizes.values())
    assert any(merged == 0.5 * size for size, merged in sizes.values())
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["width"] == {"layer1": 1.5, "layer2": 0.5}
    again = run("zip", "--recipe", tmp_path / "out" / "recipe.yaml", "--quiet", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert fxzip.load(tmp_path / "again").report.spaces == report.spaces


def test_shrink(place: Path, tmp_path: Path) -> None:
    fixed = ["--model", NAME, place / "dogs.safetensors", "--data", place / "IMAGES", *SIZE, "--quiet"]
    done = run("shrink", *fixed, "--budget", "flops<=0.6x", "--rounds", 0, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    small = fxzip.load(tmp_path / "small")
    assert small.names == ("dogs",)
    assert small.report.flops_after <= 0.6 * small.report.flops_before
    text = (tmp_path / "small" / "recipe.yaml").read_text()
    assert "fxzip shrink --recipe" in text
    assert yaml.safe_load(text)["budget"] == "flops<=0.6x"
    again = run("shrink", "--recipe", tmp_path / "small" / "recipe.yaml", "--quiet", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert "give --width or --budget" in one_line(run("shrink", *fixed, "--out", tmp_path / "none"))
    two = ["shrink", place / "birds.safetensors", *fixed, "--width", 0.5, "--out", tmp_path / "none"]
    assert "2 checkpoints given: shrink takes one" in one_line(run(*two))
    wrong = ["shrink", *fixed, "--width", "layer1:0.5", "--out", tmp_path / "none"]
    assert "write a factor like 1.15" in one_line(run(*wrong))


def test_sweep_and_report(place: Path, tmp_path: Path) -> None:
    files = [place / f"{task}.safetensors" for task in CLASSES]
    fixed = ["--model", NAME, *files, "--data", place / "IMAGES", *SIZE, "--quiet", "--no-refit"]
    more = ["--cut", "layer3", "--cut", "0.3", "--method", "zip", "--method", "select", "--json", tmp_path / "s.json"]
    done = run("sweep", *fixed, *more, "--plot", tmp_path / "s.svg")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["zip", "zip", "select", "select"]
    assert rows[0]["cut"] == "layer3"
    assert rows[0]["flops"] < rows[1]["flops"]
    assert all(set(row["scores"]) == {"agreement", "explained"} for row in rows)
    assert f"{rows[0]['scores']['explained']:.2f}" in done.stdout
    assert (tmp_path / "s.svg").read_text().count("<svg") == 1

    models = [load(NAME, path) for path in files]
    loader = ImageLoader(
        find_images(place / "IMAGES").values(), transform(data_config(models[0], input_size=(3, 32, 32)))
    )
    ready = fxzip.prepare(*models, example_inputs=next(iter(loader))[0], names=tuple(CLASSES))
    ready.observe(loader, progress=False)
    ours = ready.sweep(["layer3"], [{"method": "zip", "refit": False}], progress=False)
    assert rows[0]["scores"] == pytest.approx(ours.rows[0].scores)

    done = run("report", place / "merged", tmp_path / "r.html", "--sweep", tmp_path / "s.json")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    assert "dogs" in page
    assert page != fxzip.load(place / "merged").report.to_html(tmp_path / "without.html").read_text()
    (tmp_path / "wrong.json").write_text('{"rows": 3}')
    wrong = run("report", place / "merged", tmp_path / "r.html", "--sweep", tmp_path / "wrong.json")
    assert "Sweep.rows cannot be 3" in one_line(wrong)


def test_zip_tells_fidelity_and_writes_the_page(place: Path, tmp_path: Path) -> None:
    files = [place / f"{task}.safetensors" for task in CLASSES]
    fixed = ["--model", NAME, *files, "--data", place / "IMAGES", *SIZE, "--method", "zip", "--rounds", 0]
    done = run("zip", *fixed, "--out", tmp_path / "out", "--report", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    fidelity = fxzip.load(tmp_path / "out").report.fidelity
    assert fidelity is not None
    assert f"fidelity: {fidelity}" in done.stdout
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_limit_and_images_are_one(place: Path, tmp_path: Path) -> None:
    for name in ("--limit", "--images"):
        done = run(*zip_arguments(place, tmp_path / name, "--no-refit", name, "6"))
        assert done.exit_code == 0, done.output
    first, second = ((tmp_path / name / "recipe.yaml").read_text() for name in ("--limit", "--images"))
    assert first == second
    assert yaml.safe_load(first)["limit"] == 6
    (tmp_path / "r.yaml").write_text("images: 5\nlimit: 4\n")
    assert "images and limit mean the same" in one_line(run("zip", "--recipe", tmp_path / "r.yaml"))


def test_a_recipe_in_the_words_of_mergekit(place: Path, tmp_path: Path) -> None:
    files = [str(place / f"{task}.safetensors") for task in CLASSES]
    own = {
        "models": [
            {"model": files[0], "parameters": {"weight": 0.5}},
            {"model": files[1], "parameters": {"weight": 0.5}},
        ],
        "merge_method": "linear",
        "parameters": {"normalize": True},
        **{"model": NAME, "data": str(place / "IMAGES"), "input_size": [3, 32, 32], "cut": "layer3"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(own))
    done = run("zip", "--recipe", tmp_path / "r.yaml", "--quiet", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    zipped = fxzip.load(tmp_path / "out")
    assert (zipped.report.method, zipped.report.refitted) == ("average", 0)
    models = [load(NAME, path) for path in files]
    mean = (models[0].conv1[0].weight + models[1].conv1[0].weight) / 2
    merged = zipped.state_dict()["trunk.conv1.0.weight"]
    scale = (merged.flatten(1) / mean.flatten(1)).mean(1)  # BatchNorm is folded in
    assert torch.allclose(merged, mean * scale[:, None, None, None], atol=1e-4)


def test_completion_and_help() -> None:
    environment = {
        **os.environ,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "true",
        "_FXZIP_COMPLETE": "complete_bash",
    }
    asked = {**environment, "COMP_WORDS": "fxzip s", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'fxzip'; from fxzip.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asked, check=False)
    assert done.stdout.split() == ["shrink", "sweep"]
    assert "--install-completion" in run("--help").stdout


def test_eval_counts_what_the_network_gets_right(place: Path, tmp_path: Path) -> None:
    zipped = fxzip.load(place / "merged")
    prepare = transform(data_config(load(NAME), input_size=(3, 32, 32)))
    done = run(
        "eval", place / "merged", "--data", place / "IMAGES", "--originals", "--quiet", "--json", tmp_path / "e.json"
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dogs + birds", "dogs alone", "birds alone"]
    for number, (task, classes) in enumerate(CLASSES.items()):
        original = load(NAME, place / f"{task}.safetensors")
        right = {"merged": 0, "alone": 0}
        for label in range(classes):
            for path in (place / "IMAGES" / task / f"class{label}").iterdir():
                x = prepare(Image.open(path).convert("RGB"))[None]
                with torch.no_grad():
                    right["merged"] += int(zipped(x, task=task).argmax()) == label
                    right["alone"] += int(original(x).argmax()) == label
        assert rows[0]["tasks"][task] == pytest.approx(100 * right["merged"] / (4 * classes))
        assert rows[1 + number]["tasks"][task] == pytest.approx(100 * right["alone"] / (4 * classes))
    assert f"{rows[0]['joint']:.1f}" in done.stdout


def test_eval_of_an_archive_without_a_recipe(place: Path, tmp_path: Path) -> None:
    bare = fxzip.load(place / "merged")
    bare.save(tmp_path / "told")
    bare.information = fxzip.Information()
    bare.save(tmp_path / "bare")
    x = np.zeros((5, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "d.npz", **{"dogs.images": x, "dogs.labels": np.zeros(5, dtype=int)})
    done = run("eval", tmp_path / "bare", "--data", tmp_path / "d.npz", "--task", "dogs", "--quiet")
    assert done.exit_code == 0, done.output
    assert "no images of the task 'birds'" in one_line(
        run("eval", tmp_path / "bare", "--data", tmp_path / "d.npz", "--quiet")
    )
    np.savez(tmp_path / "only.npz", images=x, labels=np.zeros(5, dtype=int))
    assert run("eval", tmp_path / "bare", "--data", tmp_path / "only.npz", "--task", "dogs").stdout == done.stdout
    done = run("eval", tmp_path / "bare", "--data", place / "IMAGES", "--quiet")
    assert "give --input-size, --mean, --std" in one_line(done)
    assert run("eval", tmp_path / "told", "--data", place / "IMAGES", "--quiet").exit_code == 0
    done = run("eval", tmp_path / "bare", "--data", place / "IMAGES", "--recipe", place / "merged" / "recipe.yaml")
    assert done.exit_code == 0, done.output


def test_export_draw_and_inspect_a_saved_network(place: Path, tmp_path: Path) -> None:
    done = run("export", place / "merged", tmp_path / "m.pt2", "--task", "birds", "--quiet")
    assert done.exit_code == 0, done.output
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(3, 3, 32, 32)).shape == (3, 4)
    assert "differs from the network by" in done.stdout
    done = run("draw", place / "merged", tmp_path / "m.mmd")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.mmd").stat().st_size > 0
    done = run("inspect", place / "merged", "--json", tmp_path / "i.json")
    assert str(fxzip.load(place / "merged").report) in done.stdout
    assert json.loads((tmp_path / "i.json").read_text())["names"] == ["dogs", "birds"]


def test_inspect_an_architecture(tmp_path: Path) -> None:
    done = run("inspect", NAME, *SIZE, "--quiet", "--json", tmp_path / "i.json")
    assert done.exit_code == 0, done.output
    spec = fxzip.analyse(load(NAME), torch.zeros(2, 3, 32, 32))
    assert str(spec) in done.stdout
    assert "layer3" in done.stdout.rpartition("valid cuts")[2]
    values = json.loads((tmp_path / "i.json").read_text())
    assert [space["size"] for space in values["spaces"]] == [space.size for space in spec.spaces]
    assert "layer3" in values["cuts"]


def test_three_checkpoints_and_a_share_as_cut(place: Path, tmp_path: Path) -> None:
    more = ["--cut", "0.3", "--method", "permute", "--no-refit", "--limit", "6"]
    done = run(*zip_arguments(place, tmp_path / "out", *more, tasks=("dogs", "birds", "dogs")))
    assert done.exit_code == 0, done.output
    saved = fxzip.load(tmp_path / "out")
    assert saved.names == ("task0", "task1", "task2")  # two of the files have one name
    assert [value.shape[1] for value in saved(torch.zeros(1, 3, 32, 32))] == [3, 4, 3]
    assert saved.report.method == "permute"


# ---- bad input


def test_missing_checkpoint(place: Path, tmp_path: Path) -> None:
    text = one_line(run(*zip_arguments(place, tmp_path / "out", tasks=("dogs", "cats"))))
    assert "cats.safetensors does not exist" in text
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_architecture(place: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "vit.safetensors")
    arguments = ["zip", "--model", NAME, place / "dogs.safetensors", tmp_path / "vit.safetensors"]
    text = one_line(run(*arguments, "--data", place / "IMAGES", "--out", tmp_path / "out", "--quiet"))
    assert "names missing (conv1.0.weight" in text
    assert "unknown to the model (blocks.0.attn" in text


def test_broken_image_is_skipped_with_a_count_or_an_error(place: Path, tmp_path: Path) -> None:
    os.symlink(place / "IMAGES" / "dogs", tmp_path / "dogs")
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = zip_arguments(place, tmp_path / "out", "--data", tmp_path, "--no-refit")
    assert "birds/b.png cannot be read" in one_line(run(*arguments, "--strict"))
    assert not (tmp_path / "out").exists()
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("fxzip: warning: 1 image was skipped; the first: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("out", ["file", "file/merged", "full", "/proc/fxzip"])
def test_unusable_output_is_told_before_the_work(place: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    # The checkpoints are missing, too: the folder is looked at before them.
    text = one_line(run(*zip_arguments(tmp_path, tmp_path / out)))
    assert str(tmp_path / out) in text or "cannot be written to" in text
    assert "safetensors" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_overwrite(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "give --overwrite" in one_line(run(*zip_arguments(place, tmp_path)))
    done = run(*zip_arguments(place, tmp_path, "--overwrite"))
    assert done.exit_code == 0, done.output
    assert {"thesis.tex", "fxzip.json", "recipe.yaml"} <= {path.name for path in tmp_path.iterdir()}


def test_two_processes_write_what_one_writes(place: Path, tmp_path: Path) -> None:
    arguments = [str(each) for each in zip_arguments(place, tmp_path / "out", "--batch-size", "5", "--no-refit")]
    (place / "IMAGES" / "dogs" / "class0" / "broken.png").write_bytes(b"no image")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fxzip"]
    ran = subprocess.run([sys.executable, *torchrun, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("1 image was skipped") == 1
    done = run(*zip_arguments(place, tmp_path / "one", "--batch-size", "5", "--no-refit"))
    (place / "IMAGES" / "dogs" / "class0" / "broken.png").unlink()
    assert done.exit_code == 0, done.output
    mine, wanted = (fxzip.load(tmp_path / name).state_dict() for name in ("out", "one"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["observe", "save"])
@pytest.mark.parametrize("earlier", [False, True])
def test_interrupt_leaves_nothing_half_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, earlier: bool
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if earlier:
        fxzip.load(place / "merged").save(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    owner, name = (prepared.Prepared, "observe") if stage == "observe" else (io, "model_card")
    monkeypatch.setattr(owner, name, stop)
    done = run(*zip_arguments(place, tmp_path / "out", "--overwrite"))
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "fxzip: stopped; no result was written"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])


STOPPED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from fxzip import __main__, prepared
def wait(self, *_, **__):
    print("observing", flush=True)
    time.sleep(60)
prepared.Prepared.observe = wait
__main__.main()
"""


def test_a_real_ctrl_c(place: Path, tmp_path: Path) -> None:
    arguments = [str(argument) for argument in zip_arguments(place, tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "observing\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "fxzip: stopped; no result was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--cut", "layer9"], "no shared module or node of that name; valid nearby: "),
        (["--method", "zipp"], "did you mean"),
        (["--method", "permute", "--alpha", "0.5"], "has no option 'alpha'"),
        (["--method", "dual", "--option", "gamma=1e1"], "gamma=10.0: it must be a number from 0 to 1"),
        (["--cut", "flops<=2"], "write a budget as"),
        (["--option", "gamma"], "write NAME=VALUE"),
        (["--name", "only"], "one name for each of the 2 models"),
        (["--device", "toaster"], "--device toaster"),
        (["--model-arg", "bogus=1"], "cannot be built with bogus=1"),
        (["--model", "timm:resnet51"], "did you mean timm:resnet"),
        (["--model", "resnet50"], "give timm:NAME"),
        (["--labels", "dogs"], "write TASK=FILE"),
        (["--labels", "dogs=/nowhere"], "/nowhere cannot be read"),
        (["--report", "r.pdf"], "a report ends in .html"),
        (["--mean", "0.5"], "images of 3 channels need 3 values"),
        (["--ridge", "-1"], "ridge=-1.0: it must be a number, 0 or more"),
        (["--rounds", "-1"], "a whole number, 0 or more"),
        (["--data", "/nowhere"], "there is no /nowhere"),
        (["--recipe", "/nowhere.yaml"], "the recipe /nowhere.yaml cannot be read"),
    ],
)
def test_mistakes_in_one_line(place: Path, tmp_path: Path, more: list[str], says: str) -> None:
    assert says in one_line(run(*zip_arguments(place, tmp_path / "out", *more)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["zip"],
        ["zip", "--bogus"],
        ["zip", "--batch-size", "0"],
        ["zip", "--input-size", "3,a"],
        ["zip", "--input-size", "2,8,8"],
        ["zip", "--points", "some"],
        ["frobnicate"],
        ["--bogus"],
        ["--debug"],
        ["export", "merged"],
    ],
)
def test_wrong_use_in_one_line(arguments: list[str]) -> None:
    assert "--help)" in one_line(run(*arguments), status=2)


def test_one_checkpoint_is_not_enough(place: Path, tmp_path: Path) -> None:
    assert "two or more" in one_line(run(*zip_arguments(place, tmp_path / "out", tasks=("dogs",))))


def test_recipe_with_an_unknown_option(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("cutt: layer3")
    assert "unknown option 'cutt'; did you mean cut" in one_line(run("zip", "--recipe", tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha: true", "alpha=True: it must be a number from 0 to 1"),
        ("ridge: .nan", "ridge=nan: it must be a number, 0 or more"),
        ("rounds: 1.5", "rounds=1.5: it must be a whole number, 0 or more"),
        ("images: many", "images='many': it must be a whole number, 1 or more"),
        ("refit: maybe", "refit='maybe': it must be true or false"),
        ("limit: 1.5", "limit=1.5: it must be a whole number"),
        ("crop_pct: true", "crop_pct=True: it must be a number"),
    ],
)
def test_values_of_a_recipe_are_checked_as_they_stand(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert says in one_line(run("zip", "--recipe", tmp_path / "r.yaml"))


def test_the_help_is_that_of_the_settings_and_needs_no_torch() -> None:
    code = "import fxzip.cli, sys; print('torch' in sys.modules); fxzip.cli.app(['zip', '--help'])"
    environment = {**os.environ, "COLUMNS": "800"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("False")
    shown = [*MATCHING["zip"].values(), *MATCHING["cca"].values(), *(refit_settings()[k] for k in ("ridge", "rounds"))]
    assert [setting for setting in shown if str(setting) not in done.stdout] == []


def test_eval_wants_a_folder_for_each_class(place: Path, tmp_path: Path) -> None:
    for task in CLASSES:
        (tmp_path / task).mkdir()
        os.symlink(place / "IMAGES" / task / "class0", tmp_path / task / "class0")
    text = one_line(run("eval", place / "merged", "--data", tmp_path, "--quiet"))
    assert "folders of 1 classes (class0...), and the head has 3" in text


def test_what_nobody_expected_is_one_line_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(prepared.Prepared, "observe", fail)
    arguments = zip_arguments(place, tmp_path / "out")
    assert "ZeroDivisionError: by zero (fxzip --debug ... shows where)" in one_line(run(*arguments))
    assert isinstance(run(*arguments, "--debug").exception, ZeroDivisionError)
    assert isinstance(run("--debug", *arguments).exception, ZeroDivisionError)


def test_warnings_in_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_with_warnings(*_: Any, **__: Any) -> None:
        warnings.warn("channels are kept\nin place", FrozenSpaceWarning, stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
        raise OptionError("enough")

    monkeypatch.setattr(io, "load", load_with_warnings)
    monkeypatch.setattr(fxzip, "load", load_with_warnings)
    done = run("export", place / "merged", "m.onnx")
    assert done.stderr == "fxzip: warning: channels are kept in place\nfxzip: error: enough\n"


# ---- before PyTorch is imported


EARLY = """
import sys
from typer.testing import CliRunner
from fxzip import cli
done = CliRunner().invoke(cli.app, sys.argv[1:])
print(done.exit_code, "torch" in sys.modules, done.stderr, end="")
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["zip", "--model", NAME, "no.pth", "none.pth", "--data", ".", "--out", "out"], "no.pth does not exist"),
        (["zip", "--model", NAME, "a.pth", "--data", ".", "--out", "out"], "two or more"),
        (["zip", "--model", NAME, "a.pth", "b.pth", "--data", "none", "--out", "out"], "there is no none"),
        (["zip", "a.pth", "b.pth", "--data", ".", "--out", "out"], "no model name for a.pth"),
        (["zip", "--model", NAME, "a.pth", "b.pth", "--data", ".", "--out", "out", "--method", "zipp"], "'zip'"),
        (["zip", "--model", NAME, "a.pth", "b.pth", "--data", ".", "--out", "out", "--alpha", "2"], "from 0 to 1"),
        (["zip", "--model", NAME, "a.pth", "b.pth", "--data", ".", "--out", "old"], "old holds a merged network"),
        (["zip", "--model", "timm:resnet51", "a.pth", "b.pth", "--data", ".", "--out", "out"], "mean timm:resnet5"),
        (["zip", "--model", "torchvision:vgg", "a.pth", "b.pth", "--data", ".", "--out", "out"], "torchvision:vgg1"),
        (["sweep", "--model", NAME, "a.pth", "b.pth", "--data", ".", "--method", "zipp"], "'zip'"),
        (["sweep", "--model", NAME, "a.pth", "b.pth", "--data", ".", "--plot", "p.gif"], "a plot ends in .svg"),
        (["report", "none", "r.html"], "there is no none/fxzip.json"),
        (["report", "old", "r.pdf"], "a report ends in .html"),
        (["report", "old", "r.html", "--sweep", "none.json"], "none.json cannot be read"),
        (["export", "none", "m.onnx"], "there is no none/fxzip.json"),
        (["export", "old", "m.tflite"], "an export ends in .onnx, .pt2"),
        (["draw", "old", "m.gif"], "a drawing ends in .svg"),
        (["eval", "old", "--data", "none"], "there is no none"),
        (["predict", "old", "none.png"], "there is no image none.png"),
    ],
)
def test_mistakes_that_need_no_torch(tmp_path: Path, arguments: list[str], says: str) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "fxzip.json").write_text("{}")
    more = ["--method", "zip"] if "--alpha" in arguments else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", EARLY, *arguments, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    assert done.stdout.startswith("1 False fxzip: error: "), done.stdout + done.stderr
    assert says in done.stdout


# ---- an earlier merge, drawings, reports, predictions


def test_an_earlier_merge_is_replaced_on_demand_only(place: Path, tmp_path: Path) -> None:
    fxzip.load(place / "merged").save(tmp_path / "out")
    arguments = zip_arguments(place, tmp_path / "out", "--no-refit")
    assert "holds a merged network: choose another folder, or give --overwrite" in one_line(run(*arguments))
    done = run(*arguments, "--overwrite", "--report", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    assert fxzip.load(tmp_path / "out").report.refitted == 0
    assert "<html" in (tmp_path / "r.html").read_text()


def test_a_picture_that_cannot_be_drawn_is_an_error(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawable.shutil, "which", lambda _: None)
    text = one_line(run("draw", place / "merged", tmp_path / "m.png"))
    assert "m.png cannot be drawn" in text
    assert "m.mmd is Mermaid text" in text
    assert list(tmp_path.iterdir()) == []


def test_predict_names_what_the_folders_are_called(place: Path, tmp_path: Path) -> None:
    zipped = fxzip.load(place / "merged")
    assert zipped.labels == {task: tuple(f"class{i}" for i in range(count)) for task, count in CLASSES.items()}
    picture = place / "IMAGES" / "dogs" / "class1" / "0.png"
    done = run("predict", place / "merged", picture, picture, "--top", "2", "--json", tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["dogs", "birds"] * 2
    x = transform(data_config(load(NAME), input_size=(3, 32, 32)))(Image.open(picture).convert("RGB"))[None]
    with torch.no_grad():
        scores = zipped(x, task="dogs").softmax(1)[0]
    assert rows[0]["classes"][0]["label"] == f"class{int(scores.argmax())}"
    assert rows[0]["classes"][0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)
    assert f"dogs: class{int(scores.argmax())} {float(scores.max()):.1%}" in done.stdout


def test_labels_from_a_file(place: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("beagle\npug\n\ncollie\n")
    more = ["--no-refit", "--labels", f"dogs={tmp_path / 'names.txt'}"]
    done = run(*zip_arguments(place, tmp_path / "out", *more))
    assert done.exit_code == 0, done.output
    labels = fxzip.load(tmp_path / "out").labels
    assert labels["dogs"] == ("beagle", "pug", "collie")
    assert labels["birds"][0] == "class0"


def test_images_that_were_prepared_otherwise(place: Path, tmp_path: Path) -> None:
    """Two folders of timm, as save_for_hf makes them, with different means and class names."""
    for task, (classes, mean) in {"dogs": (3, 0.5), "birds": (4, 0.25)}.items():
        model = load(NAME, place / f"{task}.safetensors")
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": (mean,) * 3, "input_size": (3, 32, 32)}
        names = [f"{task}{i}" for i in range(classes)]
        timm.models.save_for_hf(model, tmp_path / task, model_config={"label_names": names})
    folders = [f"local-dir:{tmp_path / task}" for task in CLASSES]
    arguments = ["zip", *folders, "--data", place / "IMAGES", "--out", tmp_path / "out", "--quiet", "--no-refit"]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "images for birds had another mean and std, which are folded into its first layer" in done.stderr
    zipped = fxzip.load(tmp_path / "out")
    assert zipped.information.folded == ("birds",)
    assert zipped.information.preparation.mean == (0.5, 0.5, 0.5)
    assert zipped.labels["birds"] == ("birds0", "birds1", "birds2", "birds3")
    done = run("eval", tmp_path / "out", "--data", place / "IMAGES", "--originals", "--quiet")
    assert done.exit_code == 0, done.output
    done = run(*arguments[:-1], "--mean", "0.1,0.1,0.1", "--overwrite", "--no-refit")
    assert done.exit_code == 0, done.output
    assert fxzip.load(tmp_path / "out").information.folded == ()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fxzip", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fxzip ")


def test_two_architectures_are_stitched(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = timm.create_model("test_byobnet", num_classes=3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    name = f"{NAME},timm:test_byobnet"
    arguments = ("zip", place / "birds.safetensors", tmp_path / "other.safetensors", "--data", place / "IMAGES")
    out = ("--out", tmp_path / "stitched", "--quiet", *SIZE)
    result = run(*arguments, *out, "--model", name, "--stitch", "--cut", "flops<=1.9x")
    assert result.exit_code == 0, result.output
    assert " stitched to " in fxzip.load(tmp_path / "stitched").report.cut
    result = run(*arguments, *out, "--model", f"{name},{NAME}", "--stitch", "--overwrite")
    assert "give one name, or one for each of the 2 checkpoints" in result.output
