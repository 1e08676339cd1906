"""Where images are: the groups (a group is a task) in folders of files and in .npz archives.

Layouts, by group (a single one has the name ""):

- a folder of image files, at any depth; each folder inside it that holds images is a group. For measuring, a group
  is a tree with a folder for each class, in alphabetical order: ``IMAGES/dogs/beagle/1.png``;
- an ``.npz`` archive with ``dogs.images`` and ``dogs.labels``, or ``images`` and ``labels`` for the only group.
  uint8 images (n, height, width) or (n, height, width, channels) are prepared like files; floating-point ones are
  taken as they are, as (n, channels, height, width).

Archives of token ids, for language models, are read by `fxzip.data.tokens`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from fxzip.errors import CalibrationError

Transform = Callable[[Image.Image], Tensor]
BATCH = 32


@dataclass(frozen=True, eq=False)
class Group:
    """The images of one task.

    Attributes:
        name: The task, or "".
        images: Paths of files, or an array of images.
        labels: Their classes, counted from 0; None where there are none.
        classes: The names of the classes, where the source has them.
    """

    name: str
    images: Sequence[Path] | npt.NDArray[Any]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] | None = None

    @property
    def prepared(self) -> bool:
        """Whether the images are taken as they are."""
        return isinstance(self.images, np.ndarray) and self.images.dtype != np.uint8

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Path | npt.NDArray[Any], int]:
        """An image, and its label, -1 without one."""
        return self.images[number], -1 if self.labels is None else int(self.labels[number])


def find_images(path: Path, *, labelled: bool = False) -> dict[str, Group]:
    """The groups of images in a folder or an .npz archive, by name.

    Args:
        path: The folder or the archive; see the top of this module for how they are laid out.
        labelled: Labels are needed.

    Raises:
        CalibrationError: The path is neither, holds no images, or arrays have unusable shapes or no labels.
    """
    if not path.exists():
        raise CalibrationError(f"there is no {path}: give a folder of images, or an .npz archive")
    if path.is_dir():
        groups = _labelled_folders(path) if labelled else _folders(path)
    elif path.suffix == ".npz":
        groups = _archive(path, labelled)
    else:
        raise CalibrationError(f"{path} is neither a folder of images nor an .npz archive")
    if not any(len(group) for group in groups):
        raise CalibrationError(f"{path} holds no images{' in folders of tasks and classes' if labelled else ''}")
    return {group.name: group for group in groups}


def _is_image(path: Path) -> bool:
    from torchvision.datasets.folder import is_image_file

    return path.is_file() and bool(is_image_file(path.name)) and not path.name.startswith(".")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_image(path))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _folders(root: Path) -> list[Group]:
    """A group for each folder inside, and one for the files beside them."""
    groups = [Group(folder.name, _files(folder)) for folder in _subfolders(root)]
    groups.append(Group("", sorted(path for path in root.iterdir() if _is_image(path))))
    return [group for group in groups if len(group)]


def _labelled_folders(root: Path) -> list[Group]:
    """A group for each folder inside, with a class for each folder in that."""
    groups = []
    for folder in _subfolders(root):
        classes = _subfolders(folder)  # an empty one counts, too
        images = [(path, label) for label, sub in enumerate(classes) for path in _files(sub)]
        names = tuple(sub.name for sub in classes)
        groups.append(Group(folder.name, [path for path, _ in images], [label for _, label in images], names))
    return [group for group in groups if len(group)]


def _archive(path: Path, labelled: bool) -> list[Group]:
    groups = []
    for task, (images, labels) in read_arrays(path, "images", "labels").items():
        _check_arrays(f"{path}: {array_name(task, 'images')}", images, labels, labelled)
        groups.append(Group(task, images, None if labels is None else labels.tolist()))
    if not groups:
        raise CalibrationError(
            f"{path} has no array called images or TASK.images; it has {', '.join(_names(path)) or 'none'}"
        )
    return groups


def array_name(task: str, kind: str) -> str:
    """What an array of a group is called in an archive."""
    return f"{task}.{kind}" if task else kind


def read_arrays(path: Path, kind: str, beside: str) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]:
    """The arrays of one kind in an .npz archive, by group, each with the one of another kind that lies beside it.

    Args:
        path: The archive.
        kind: What the arrays are called, alone or behind the name of a group: ``dogs.images``.
        beside: What those are called that may be missing.

    Raises:
        CalibrationError: It cannot be read.
    """
    with _opened(path) as archive:
        tasks = [name.rpartition(".")[0] for name in archive.files if name.rpartition(".")[2] == kind]
        others = {task: array_name(task, beside) for task in tasks}
        return {
            task: (archive[array_name(task, kind)], archive[other] if other in archive.files else None)
            for task, other in others.items()
        }


def _names(path: Path) -> list[str]:
    with _opened(path) as archive:
        return list(archive.files)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An .npz archive; what is wrong with it is found when arrays are read, too."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read as an .npz archive: {error}") from error


def _check_arrays(name: str, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None, labelled: bool) -> None:
    floating = np.issubdtype(images.dtype, np.floating)
    bytes_ = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4)))
    if not bytes_ and not (floating and images.ndim == 4):
        raise CalibrationError(
            f"{name} is {images.dtype}{list(images.shape)}; images are uint8 (n, height, width[, channels]), "
            "or floating-point (n, channels, height, width) if they are prepared already"
        )
    if labels is None and labelled:
        raise CalibrationError(f"{name} has no labels beside it: {name.rpartition('images')[0].split()[-1]}labels")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise CalibrationError(
            f"{name}: the labels are {labels.dtype}{list(labels.shape)}; give {len(images)} integers"
        )
