"""Images for merging and for measuring: the images of groups (`fxzip.data.groups`) as a loader of batches."""

from __future__ import annotations

import itertools
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

from fxzip.data.groups import Group
from fxzip.data.shares import order_of, read
from fxzip.errors import CalibrationError

Transform = Callable[[Image.Image], Tensor]
BATCH = 32


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
        return self._good(self._loader)

    def order(self) -> list[Any] | None:
        """What stands for each batch (`fxzip.data.shares`)."""
        return order_of(self._loader)

    def read(self, order: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that these stand for."""
        return self._good(read(self._loader, order)) if order else iter(())

    def _good(self, batches: Iterable[_Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of batches that can be read."""
        some = False
        for batch in batches:
            self.broken |= batch.broken
            if self._strict and batch.broken:
                name, why = next(iter(batch.broken.items()))
                raise CalibrationError(f"{name} cannot be read: {why}")
            if batch.images is not None:
                some = True
                yield batch.images, batch.labels
        if not some:
            raise CalibrationError(f"none of the images can be read; {_first(self.broken)}")

    def skipped(self) -> str | None:
        """A sentence on the images that were passed over; None if there were none."""
        if not self.broken:
            return None
        many = "image was" if len(self.broken) == 1 else "images were"
        return f"{len(self.broken)} {many} skipped; {_first(self.broken)}"


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
        turns = itertools.zip_longest(*(shuffled(len(group), seed, number) for number, group in enumerate(groups)))
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
                return self.transform(in_bytes(image).convert(self.mode))
        if value.dtype == np.uint8:
            pixels = value[..., 0] if value.shape[2:] == (1,) else value
            return self.transform(Image.fromarray(pixels).convert(self.mode))
        return torch.from_numpy(value).float()


def in_bytes(image: Image.Image) -> Image.Image:
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


def shuffled(count: int, seed: int | None, group: int = 0) -> list[int]:
    """The numbers of a group's samples in a random order; in theirs without a seed."""
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
