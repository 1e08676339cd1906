"""Sums over images of how much values differ from what they should be, and of how much these vary."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fxzip.processes import Processes

_K = TypeVar("_K", bound=Hashable)

_NOISE = 1e-12
"""An output that varies by less than this share of its size is constant."""


class Errors:
    """Sums over images of the squared error of one output, and of its variation about the mean over the images.

    Attributes:
        classes: The axis of the classes, behind that of the images; None where it has none.
        count: How many images there were.
    """

    def __init__(self, classes: int | None = None) -> None:
        self.classes = classes
        self.count = self.positions = 0
        self.error = self.right = self.kl = 0.0
        self._shift: Tensor | None = None
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, wanted: Tensor, has: Tensor) -> None:
        """Add a batch, along axis 0."""
        work = torch.promote_types(wanted.dtype, torch.float32)
        wanted, has = wanted.to(work), has.to(work)
        if self._shift is None:
            self._shift = wanted.mean(0)
        moved = wanted - self._shift
        self.count += len(wanted)
        self.error += float((wanted - has).square().sum(dtype=torch.float64))
        self._sum = self._sum + moved.sum(0, dtype=torch.float64)
        self._square = self._square + moved.square().sum(dtype=torch.float64)
        if self.classes is not None:
            target, given = (x.movedim(self.classes, -1).log_softmax(-1) for x in (wanted, has))
            self.positions += target[..., 0].numel()
            self.right += float((target.argmax(-1) == given.argmax(-1)).sum())
            self.kl += float(F.kl_div(given, target, log_target=True, reduction="sum"))

    @property
    def total(self) -> float:
        """The sum of squares about the mean."""
        return float(self._square - self._sum.square().sum() / self.count)

    @property
    def varies(self) -> bool:
        """Whether it varies by more than rounding."""
        return bool(self.count) and self.total > _NOISE * self.count * float(self.mean.square().sum())

    @property
    def mean(self) -> Tensor:
        """The mean over the images, of the shape of one."""
        assert self._shift is not None
        return self._shift.double() + self._sum / self.count

    def figures(self) -> tuple[float, float | None, float | None]:
        """Unexplained share, agreement and mean KL."""
        share = self.error / self.total
        if self.classes is None:
            return share, None, None
        return share, self.right / self.positions, self.kl / self.positions

    def shifted(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of what lies beyond some place, and of its squares."""
        assert self._shift is not None
        gap = self._shift.double() - place.to(self._sum.device)
        square = self._square + 2 * (gap * self._sum).sum() + self.count * gap.square().sum()
        return self._sum + self.count * gap, square

    def of_all(self, place: Tensor, numbers: Tensor) -> Errors:
        """The sums over the processes: about their mean, and as `numbers` has them."""
        found = Errors(self.classes)
        count, positions, found.error, found.right, found.kl, square = numbers.tolist()
        found.count, found.positions = round(count), round(positions)
        found._shift, found._sum, found._square = (
            place,
            torch.zeros_like(place),
            torch.tensor(square, dtype=torch.float64),
        )
        return found

    def numbers(self, place: Tensor) -> Tensor:
        """What adds up over processes, once the place is known that values are taken about, float64."""
        square = float(self.shifted(place)[1]) if self.count else 0.0
        own = [self.count, self.positions, self.error, self.right, self.kl, square]
        return torch.tensor(own, dtype=torch.float64)


def over_all(processes: Processes, own: Mapping[_K, Errors]) -> dict[_K, Errors]:
    """The sums over all processes; some may have no image, and know of no output."""
    if processes.count == 1:
        return dict(own)
    known = {key: (tuple(found.mean.shape), found.classes) for key, found in own.items() if found.count}
    shapes: dict[_K, tuple[tuple[int, ...], int | None]] = {}
    for each in processes.everywhere("what is compared", known):
        shapes |= {key: value for key, value in each.items() if key not in shapes}
    if not shapes:
        return {}
    errors = {key: own.get(key) or Errors(classes) for key, (_, classes) in shapes.items()}
    sums = [
        torch.cat([(found.mean * found.count).flatten(), found.mean.new_tensor([found.count])]).cpu()
        if found.count
        else torch.zeros(torch.Size(shapes[key][0]).numel() + 1, dtype=torch.float64)
        for key, found in errors.items()
    ]
    means = [
        (total[:-1] / total[-1]).reshape(shape)
        for total, (shape, _) in zip(processes.total("comparing", sums), shapes.values(), strict=True)
    ]
    places = dict(zip(shapes, means, strict=True))
    table = torch.stack([found.numbers(places[key]) for key, found in errors.items()])
    (totals,) = processes.total("comparing", [table])
    return {key: found.of_all(places[key], row) for (key, found), row in zip(errors.items(), totals, strict=True)}
