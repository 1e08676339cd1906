"""What can be wrong with a command is looked at before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxzip.errors import CalibrationError, CheckpointError, FileFormatError, OptionError, SaveError
from fxzip.folders import PLAN, scratch_folder
from fxzip.model_names import LIBRARIES, unknown_model, written_models
from fxzip.settings import AUTO, MATCHING

REMOTE, LOCAL = "hf-hub:", "local-dir:"


def check_network(folder: Path) -> None:
    """Raise unless a folder may be a merged network; one on the hub is only known when it is loaded.

    Raises:
        FileFormatError: It has no plan.
    """
    if not str(folder).startswith(REMOTE) and not (folder / PLAN).is_file():
        raise FileFormatError(f"there is no {folder / PLAN}: give a folder that fxzip zip made, or hf-hub:OWNER/NAME")


def check_data(path: Path) -> None:
    """Raise unless images may be there.

    Raises:
        CalibrationError: There is nothing, or no folder and no .npz archive.
    """
    if not path.exists():
        raise CalibrationError(f"there is no {path}: give a folder of images, or an .npz archive")
    if not path.is_dir() and path.suffix != ".npz":
        raise CalibrationError(f"{path} is neither a folder of images nor an .npz archive")


def models_of(given: str | None, count: int, stitch: bool) -> list[str | None]:
    """The name of each checkpoint's model; one for all, or with ``--stitch`` one for each, with commas between.

    Raises:
        OptionError: There are more or fewer.
    """
    names = given.split(",") if given is not None and stitch else [given]
    if len(names) not in (1, count):
        raise OptionError(f"--model {given}: give one name, or one for each of the {count} checkpoints")
    return [name.strip() if name else name for name in names] * (count if len(names) == 1 else 1)


def check_checkpoints(paths: Sequence[str], models: Sequence[str | None], least: int = 2) -> None:
    """Raise unless checkpoints may be there, at least so many, and it is known of which model each is.

    Raises:
        OptionError: There are fewer, or no model is named.
        CheckpointError: One is missing.
    """
    if len(paths) < least:
        raise OptionError(f"{len(paths)} checkpoint given: merging takes two or more")
    for text, model in zip(paths, models, strict=True):
        path = Path(text.removeprefix(LOCAL))
        if text.startswith(REMOTE):
            continue
        if text.startswith(LOCAL) or path.is_dir():
            if not (path / "config.json").is_file():
                what = "is a folder without a config.json" if path.is_dir() else "does not exist"
                raise CheckpointError(f"the checkpoint {path} {what}")
            continue
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {path} does not exist")
        if model is None:
            raise OptionError(f"no model name for {text}: give one like --model timm:resnet50")
    for model in models:
        _check_model(model)


def _check_model(model: str | None) -> None:
    source, colon, _ = (model or "timm:").partition(":")
    if not colon or source.replace("_", "-").lower() not in (*LIBRARIES, REMOTE[:-1], LOCAL[:-1]):
        raise OptionError(f"--model {model}: give timm:NAME, torchvision:NAME, local-dir:FOLDER or hf-hub:REPO")
    wrong = unknown_model(model, written_models) if model is not None and source in LIBRARIES else None
    if wrong is not None and written_models(source):
        raise OptionError(wrong)


def check_matching(method: str, given: Mapping[str, Any]) -> None:
    """Raise unless there is such a method, and it has such options.

    Raises:
        OptionError: There is not, or an option is out of range.
    """
    known = MATCHING.get(method, {})
    if method != AUTO and method not in MATCHING:
        near = difflib.get_close_matches(method, (AUTO, *MATCHING), n=3, cutoff=0.3) or [AUTO, *MATCHING]
        raise OptionError(f"unknown matching method {method!r}; did you mean {', '.join(map(repr, near))}?")
    for name, value in given.items():
        if name in known:
            known[name].check(name, value)
        elif method != AUTO:
            raise OptionError(f"method {method!r} has no option {name!r}: it takes {', '.join(known) or 'none'}")


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise now what saving a network there would raise after the work.

    Raises:
        SaveError: The folder holds another network or other things, is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        what = "a merged network" if (folder / PLAN).exists() else "other files"
        raise SaveError(f"{folder} holds {what}: choose another folder, or give --overwrite")
    check_writable(folder)


def check_writable(path: Path) -> None:
    """Raise unless files can be made at the path, or in the nearest folder above it that exists.

    Raises:
        SaveError: They cannot.
    """
    near = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    with scratch_folder(near):
        pass


def check_suffix(path: Path, suffixes: Sequence[str], what: str) -> None:
    """Raise unless a file's name has one of some endings, and is no folder.

    Raises:
        OptionError: It has another.
    """
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"{path.name}: {what} ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise OptionError(f"{path} is a folder: give a file")


def check_page(path: Path) -> None:
    """Raise unless a report's page can be written there.

    Raises:
        OptionError: Its name has another ending, or matplotlib is not installed.
        SaveError: Nothing can be written there.
    """
    check_suffix(path, (".html",), "a report")
    check_writable(path.absolute().parent)
    check_matplotlib(path.name)


def check_matplotlib(what: str) -> None:
    """Raise unless charts can be drawn.

    Raises:
        OptionError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(f"{what}: charts need matplotlib: pip install 'fxzip[report]'")
