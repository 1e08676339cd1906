"""Images for merging and for measuring: folders of files and .npz archives, as loaders of batches.

Layouts, by group (a group is a task; a single one has the name ""):

- a folder of image files, at any depth; each folder inside it that holds images is a group. For measuring, a group
  is a tree with a folder for each class, in alphabetical order: ``IMAGES/dogs/beagle/1.png``;
- an ``.npz`` archive with ``dogs.images`` and ``dogs.labels``, or ``images`` and ``labels`` for the only group.
  uint8 images (n, height, width) or (n, height, width, channels) are prepared like files; floating-point ones are
  taken as they are, as (n, channels, height, width).
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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


class ImageLoader:
    """Batches (images, labels) of one or more groups, mixed evenly, in the same order each time it is read.

    Images are float tensors (batch, channels, height, width), labels int64 (batch,), -1 where there are none.

    Attributes:
        broken: Why an image could not be read, by its name; they are passed over. Grows while the loader is read.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        transform: Transform,
        *,
        channels: int = 3,
        batch_size: int = BATCH,
        limit: int | None = None,
        seed: int | None = 0,
        strict: bool = False,
        workers: int = 0,
    ) -> None:
        """Make a loader.

        Args:
            groups: Where the images are.
            transform: From a PIL image to a tensor.
            channels: 1 for grey images, 3 for coloured ones.
            batch_size: Images in a batch.
            limit: The most images, drawn evenly from the groups; None: all.
            seed: Of the random order in each group; None: the order of the source.
            strict: Raise for an image that cannot be read.
            workers: Processes that read images.
        """
        self.broken: dict[str, str] = {}
        self._strict = strict
        data = _Images(tuple(groups), transform, "L" if channels == 1 else "RGB", limit, seed)
        self._loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_collate)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        some = False
        for batch in self._loader:
            self.broken |= batch.broken
            if self._strict and batch.broken:
                name, why = next(iter(batch.broken.items()))
                raise CalibrationError(f"{name} cannot be read: {why}")
            if batch.images is not None:
                some = True
                yield batch.images, batch.labels
        if not some:
            raise CalibrationError(f"not one of the images can be read; {_first(self.broken)}")

    def skipped(self) -> str | None:
        """A sentence on the images that were passed over; None if there were none."""
        if not self.broken:
            return None
        many = "image was" if len(self.broken) == 1 else "images were"
        return f"{len(self.broken)} {many} skipped; {_first(self.broken)}"


# ---- finding images


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
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name.rpartition(".")[2] in ("images", "labels")}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read as an .npz archive: {error}") from error
    groups = []
    for name in (name for name in arrays if name.rpartition(".")[2] == "images"):
        task = name.rpartition(".")[0]
        labels = arrays.get(f"{task}.labels" if task else "labels")
        _check_arrays(f"{path}: {name}", arrays[name], labels, labelled)
        groups.append(Group(task, arrays[name], None if labels is None else labels.tolist()))
    if not groups:
        raise CalibrationError(
            f"{path} has no array called images or TASK.images; it has {', '.join(arrays) or 'none'}"
        )
    return groups


def _check_arrays(name: str, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None, labelled: bool) -> None:
    floating = np.issubdtype(images.dtype, np.floating)
    bytes_ = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4)))
    if not bytes_ and not (floating and images.ndim == 4):
        raise CalibrationError(
            f"{name} is {images.dtype}{list(images.shape)}; images are uint8 (n, height, width[, channels]), "
            "or floating-point (n, channels, height, width), which are taken as prepared"
        )
    if labels is None and labelled:
        raise CalibrationError(f"{name} has no labels beside it: {name.rpartition('images')[0].split()[-1]}labels")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise CalibrationError(
            f"{name}: the labels are {labels.dtype}{list(labels.shape)}; give {len(images)} integers"
        )


# ---- reading them


@dataclass(frozen=True, eq=False)
class _Item:
    image: Tensor | None
    label: int
    name: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class _Batch:
    images: Tensor | None
    labels: Tensor
    broken: Mapping[str, str]


class _Images(Dataset[_Item]):
    """The chosen images of some groups, in turn."""

    def __init__(
        self, groups: Sequence[Group], transform: Transform, mode: str, limit: int | None, seed: int | None
    ) -> None:
        self.groups, self.transform, self.mode = groups, transform, mode
        turns = itertools.zip_longest(*(_order(len(group), seed, number) for number, group in enumerate(groups)))
        mixed = ((g, i) for turn in turns for g, i in enumerate(turn) if i is not None)
        self.chosen = list(itertools.islice(mixed, limit))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> _Item:
        place, index = self.chosen[number]
        group = self.groups[place]
        value, label = group[index]
        name = str(value) if isinstance(value, Path) else f"image {index} of {group.name or 'the archive'}"
        try:
            return _Item(self._read(value), label, name)
        # What Pillow raises for a broken file, by format.
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            return _Item(None, label, name, " ".join(str(error).split()) or type(error).__name__)

    def _read(self, value: Path | npt.NDArray[Any]) -> Tensor:
        if isinstance(value, Path):
            with Image.open(value) as image:
                return self.transform(_in_bytes(image).convert(self.mode))
        if value.dtype == np.uint8:
            pixels = value[..., 0] if value.shape[2:] == (1,) else value
            return self.transform(Image.fromarray(pixels).convert(self.mode))
        return torch.from_numpy(value).float()


def _in_bytes(image: Image.Image) -> Image.Image:
    """The image with 8 bits for each channel, as `Image.convert` expects: it would cut off all that is above 255.

    Whole numbers of 16 or 32 bits are of 0 to 65,535, as PNG has them; floats of 0 to 1, or else of 0 to 255.

    Raises:
        ValueError: The values are outside of that.
    """
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # of which Pillow warns otherwise
    if image.mode != "F" and image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    most = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= most:
        raise ValueError(f"its values ({image.mode}) are {low:g} to {high:g}, which is neither 8 nor 16 bits")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))


def _order(count: int, seed: int | None, group: int) -> list[int]:
    if seed is None:
        return list(range(count))
    found: list[int] = np.random.default_rng((seed, group)).permutation(count).tolist()
    return found


def _collate(items: Sequence[_Item]) -> _Batch:
    good = [(item.image, item.label) for item in items if item.image is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return _Batch(images, labels, {item.name: item.why for item in items if item.image is None})


def _first(broken: Mapping[str, str]) -> str:
    name, why = next(iter(broken.items()), ("", ""))
    return f"the first: {name}: {why}" if name else "there are none"
