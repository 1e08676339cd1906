"""Writing files that appear whole or not at all, and reading files that a stranger may have made."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from fxzip.errors import SaveError

PLAN = "fxzip.json"
"""The file of a merged network's folder that says what it is."""
OPEN: set[Path] = set()
"""The scratch folders that exist now, to be removed if the process ends at once."""


@contextmanager
def scratch_folder(parent: Path, error: type[Exception] = SaveError) -> Iterator[Path]:
    """An empty folder inside ``parent`` that is gone afterwards; it is made before any other work.

    Args:
        parent: Where something will be written; it is made where it is missing.
        error: What to raise where nothing can be written there.

    Raises:
        Exception: ``error``, also for a full disk inside the block.
    """
    scratch = parent / f".fxzip-{uuid.uuid4().hex[:8]}"
    OPEN.add(scratch)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
    except OSError as reason:
        OPEN.discard(scratch)
        raise error(f"{parent} cannot be written to: {reason.strerror}") from reason
    try:
        yield scratch
    except OSError as reason:
        raise error(f"{parent} cannot be written to: {reason.strerror or reason}") from reason
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        OPEN.discard(scratch)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path``, or is merged into it, when the block ends well.

    Raises:
        SaveError: ``path`` is a file, or nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise SaveError(f"{path} is a file: give a folder")
    with scratch_folder(path if path.is_dir() else path.parent) as scratch:
        fresh = scratch / "fresh"
        fresh.mkdir()
        yield fresh
        if path.is_dir():
            replace_files(fresh, path, scratch)
        else:
            fresh.rename(path)


def replace_files(source: Path, target: Path, scratch: Path) -> None:
    """Move the files of a folder into another; if that fails or is stopped, all is put back.

    Raises:
        OSError: A file cannot be moved.
    """
    old = scratch / "old"
    old.mkdir(exist_ok=True)
    names = sorted(entry.name for entry in source.iterdir())
    try:
        for name in names:
            if (target / name).exists():
                os.replace(target / name, old / name)
            os.replace(source / name, target / name)
    except BaseException:
        for name in names:
            if (old / name).exists():
                os.replace(old / name, target / name)
            elif not (source / name).exists():
                (target / name).unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes, error: type[Exception] = SaveError) -> Path:
    """Write a file whole or not at all; an earlier one is replaced.

    Raises:
        Exception: ``error``, where ``path`` is a folder or nothing can be written there.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise error(f"{path} is a folder: give the name of a file")
    with scratch_folder(path.parent, error) as scratch:
        (scratch / "file").write_bytes(content)
        os.replace(scratch / "file", path)
    return path


@contextmanager
def open_regular(path: Path, most: int) -> Iterator[BufferedReader]:
    """A file open for reading, if it is a regular one of a bounded size; links are followed, as hubs keep files so.

    Args:
        path: The file.
        most: The largest size in bytes.

    Raises:
        OSError: It cannot be opened, is a pipe, a device or a folder (it is never waited for), or is too large.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if found.st_size > most:
            raise OSError(f"{path.name} has {found.st_size:,} bytes, more than the {most:,} that are read")
        yield file


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of a bounded size, also if it grows meanwhile.

    Raises:
        OSError: As for `open_regular`.
    """
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path.name} has more than the {most:,} bytes that are read")
    return content
