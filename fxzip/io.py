"""Save a merged network as a folder, and load it where neither its classes nor timm are, without pickle.

The folder holds ``model.safetensors`` (all tensors), ``fxzip.json`` (the plan: see `fxzip.plan`) and
``README.md`` (a model card with the report). Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxzip.card import model_card
from fxzip.errors import FileFormatError, OptionError, SaveError
from fxzip.folders import PLAN, new_folder, open_regular, read_regular
from fxzip.hub import located
from fxzip.information import Information
from fxzip.merged import ZippedModel
from fxzip.names import bad_name
from fxzip.plan import read_graph, read_record, read_state, write_graph, write_record, write_state
from fxzip.plan.examples import read_example, write_example
from fxzip.plan.graphs import tensors_of
from fxzip.plan.text import MOST_BYTES, parse
from fxzip.plan.trial import check_run
from fxzip.report import Report
from fxzip.surroundings import undisturbed

if TYPE_CHECKING:
    from os import PathLike

VERSION = 1
WEIGHTS, CARD = "model.safetensors", "README.md"
MOST_WEIGHTS = 1 << 38
"""Bytes of the largest file of weights that is read."""

_AGAIN = "copy the folder again, or save the network again"


@undisturbed
def save(zipped: ZippedModel, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a merged network; an earlier one in the same folder is replaced, other files there stay.

    Args:
        zipped: The network.
        folder: Where to; it appears whole or not at all.
        overwrite: Write even into a folder that holds other files.

    Returns:
        The folder.

    Raises:
        SaveError: The folder holds other things or cannot be written to, or the network has something that
            cannot be loaded without its classes: a function of the user's own, a layer that is not
            torch.nn's; or one that `load` would refuse. The node or layer is named.
    """
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not overwrite and not (path / PLAN).exists():
        raise SaveError(f"{path} holds other files: choose another folder, or give overwrite=True")
    with new_folder(path) as fresh:
        plan = _plan(zipped)
        try:
            zipped.information.checked(zipped.names)
            _check_run(zipped)
        except FileFormatError as error:
            raise SaveError(
                f"the network cannot be saved, as it could not be loaded: {_one_line(str(error))}"
            ) from error
        tensors, plan["state"] = write_state(zipped)
        write_tensors(fresh / WEIGHTS, tensors)
        plan["weights"] = dict(zip(("bytes", "sha256"), _measure(fresh / WEIGHTS), strict=True))
        plan["sha256"] = plan_hash(plan)
        (fresh / PLAN).write_bytes(_text(plan))
        (fresh / CARD).write_text(model_card(zipped), encoding="utf-8")
        shutil.copymode(fresh / PLAN, fresh / WEIGHTS)  # safetensors lets only the owner read it
    return path


@undisturbed
def load(
    folder: str | PathLike[str], *, device: torch.device | str = "cpu", revision: str | None = None
) -> ZippedModel:
    """Load a network that `ZippedModel.save` saved: the same outputs, bit by bit.

    Args:
        folder: The folder; or ``owner/name`` of the Hugging Face hub, of which its two files are downloaded
            (`fxzip.hub`).
        device: Where the network goes.
        revision: A branch, a tag or a commit of the hub's.

    Raises:
        HubError: It cannot be had from the hub.
        FileFormatError: A file is missing, cut short, altered, of a newer format, or asks for something that
            a saved network may not.
    """
    path = located(folder, revision)
    plan = _read_plan(path / PLAN)
    tensors = _read_tensors(path / WEIGHTS, plan.get("weights"))
    with _as_format_error(path / PLAN):
        zipped = _built(plan, tensors)
    zipped = zipped.to(device).eval()
    with _as_format_error(path / PLAN):
        _check_run(zipped)
    return zipped


@contextmanager
def _as_format_error(path: Path) -> Iterator[None]:
    """Whatever goes wrong with what a file says, in one line."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, (FileFormatError, OptionError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{path}: {_one_line(reason)}; {_AGAIN}") from error


def _check_run(zipped: ZippedModel) -> None:
    """Run a network on tensors without memory: see `fxzip.plan.trial`."""
    heads = {name: zipped.head(name) for name in zipped.names}
    check_run(zipped.trunk, heads, zipped.example, list(tensors_of(zipped).values()))


# ---- the plan


def _plan(zipped: ZippedModel) -> dict[str, Any]:
    import fxzip

    return {
        "format": "fxzip",
        "version": VERSION,
        "versions": {"fxzip": fxzip.__version__, "torch": torch.__version__},
        "names": list(zipped.names),
        "report": write_record(zipped.report),
        "information": write_record(zipped.information),
        "example": write_example(zipped.example),
        "trunk": write_graph(zipped.trunk),
        "heads": [write_graph(zipped.head(name)) for name in zipped.names],
    }


def _text(plan: Mapping[str, Any]) -> bytes:
    """A plan as it is written.

    Raises:
        SaveError: `load` would not read it.
    """
    text = (json.dumps(plan, indent=1, allow_nan=False) + "\n").encode()
    if len(text) > MOST_BYTES:
        raise SaveError(f"the plan of the network has {len(text):,} bytes, more than the {MOST_BYTES:,} that are read")
    try:
        parse(text)
    except ValueError as error:
        raise SaveError(f"the network cannot be saved: {_one_line(str(error))}") from error
    return text


def plan_hash(plan: Mapping[str, Any]) -> str:
    """The SHA-256 of a plan without its own; it tells damage, not intent."""
    rest = {key: value for key, value in plan.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = parse(read_regular(path, MOST_BYTES))
        whole = isinstance(plan, dict) and plan.get("sha256") == plan_hash(plan)
    except (FileNotFoundError, NotADirectoryError):
        raise FileFormatError(f"there is no {path}: give a folder that zipped.save(folder) made") from None
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {_one_line(str(error))}") from error
    except ValueError as error:
        raise FileFormatError(f"{path} was cut short or altered ({_one_line(str(error))}): {_AGAIN}") from error
    if not isinstance(plan, dict) or plan.get("format") != "fxzip":
        raise FileFormatError(f"{path} is not a plan of fxzip: give a folder that zipped.save(folder) made")
    version = plan.get("version")
    if not isinstance(version, int) or version > VERSION:
        maker = (plan.get("versions") or {}).get("fxzip") if isinstance(plan.get("versions"), dict) else None
        raise FileFormatError(
            f"{path} is of format {version!r} (fxzip {maker}), and this fxzip reads formats up to {VERSION}: "
            "pip install -U fxzip"
        )
    if not whole:
        raise FileFormatError(f"{path} was altered, its SHA-256 differs: {_AGAIN}")
    return plan


def _built(plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ZippedModel:
    names, heads = plan["names"], plan["heads"]
    if not isinstance(names, list) or not isinstance(heads, list) or len(names) != len(heads):
        raise FileFormatError("the tasks and the heads differ in number")
    wrong = bad_name(names)
    if wrong is not None or not names or len(set(names)) != len(names):
        raise FileFormatError(wrong or f"the tasks are {names!r}: there must be some, all different")
    tied = plan["state"].get("tied") if isinstance(plan["state"], dict) else None
    most = len(tensors) + (len(tied) if isinstance(tied, dict) else 0)
    zipped = ZippedModel(
        read_graph(plan["trunk"], "Trunk", most),
        {name: read_graph(head, "Head", most) for name, head in zip(names, heads, strict=True)},
        read_record(Report, plan["report"]),
        read_example(plan["example"]),
    )
    read_state(zipped, tensors, plan["state"])
    if "information" in plan:  # there was none at first
        zipped.information = read_record(Information, plan["information"]).checked(names)
    return zipped


# ---- the tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        SaveError: The tensors cannot be saved.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, KeyError, ValueError) as error:
        raise SaveError(f"the tensors cannot be saved: {_one_line(str(error))}") from error


def _read_tensors(path: Path, expected: Any) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    size, digest = (expected.get(key) if isinstance(expected, dict) else None for key in ("bytes", "sha256"))
    try:
        found, actual = _measure(path)
        if isinstance(size, int) and found < size:
            raise FileFormatError(f"{path} was cut short: it has {found:,} bytes of {size:,}; {_AGAIN}")
        if found != size or actual != digest:
            raise FileFormatError(f"{path} was altered, its SHA-256 is not the one in {PLAN}: {_AGAIN}")
        return load_file(path)
    except FileNotFoundError:
        raise FileFormatError(f"there is no {path}: {_AGAIN}") from None
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{path} cannot be read: {_one_line(str(error))}; {_AGAIN}") from error


def _measure(path: Path) -> tuple[int, str]:
    """The size and the SHA-256 of a regular file."""
    with open_regular(path, MOST_WEIGHTS) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 300 else f"{line[:300]}..."
