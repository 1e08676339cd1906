"""What the heads should give: the parents' outputs on the images, and how far from them a network's are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from fxzip.data.batches import Given, batch_size, map_tensors
from fxzip.graphs import bind_inputs
from fxzip.passes.compare import class_axis_of, leaves, of_tokens
from fxzip.passes.polish.distance import Distance, Variation

Outputs = Mapping[int, Mapping[str, Tensor]]
"""The float tensors of each parent's output, or of the head's in its place, by where they are."""
TOGETHER = 64
"""Images that are run at once."""


@dataclass(frozen=True, eq=False)
class Answered:
    """One output of a head, with what it should be.

    Attributes:
        has: What the head gives.
        wanted: What its parent does.
        distance: How far apart they are.
    """

    has: Tensor
    wanted: Tensor
    distance: Distance


@dataclass(eq=False)
class Goal:
    """The parents' outputs on some images, in parts of at most `TOGETHER`.

    The error is the mean over all outputs of their `Distance`.

    Attributes:
        parents: The networks, by number.
        images: The images.
        memory: Most bytes of outputs to keep; what is more is computed again each time.
    """

    parents: Mapping[int, fx.GraphModule]
    images: Sequence[Given]
    memory: int
    _kept: dict[int, Outputs] = field(default_factory=dict)
    _held: int = 0

    @property
    def places(self) -> range:
        """The numbers of the images' parts."""
        return range(len(self.images))

    def wanted(self, place: int) -> Outputs:
        """What the parents give for a part of the images."""
        if place in self._kept:
            return self._kept[place]
        batch = self.images[place]
        with torch.no_grad():
            found = {
                number: leaves(parent(*bind_inputs(parent, *batch).values())) for number, parent in self.parents.items()
            }
        size = sum(leaf.nbytes for own in found.values() for leaf in own.values())
        if self._held + size <= self.memory:
            self._kept[place] = found
            self._held += size
        return found

    @cached_property
    def distances(self) -> dict[tuple[int, str], Distance]:
        """The distance of each output that varies."""
        seen: dict[tuple[int, str], Variation] = {}
        for place in self.places:
            tokens = of_tokens(*self.images[place])
            for number, own in self.wanted(place).items():
                for name, leaf in own.items():
                    if (number, name) not in seen:
                        seen[number, name] = Variation(class_axis_of(name, leaf, tokens))
                    seen[number, name].add(leaf)
        share = 1 / max(sum(variation.total > 0 for variation in seen.values()), 1)
        found = {key: variation.distance(share) for key, variation in seen.items()}
        return {key: distance for key, distance in found.items() if distance is not None}

    def answered(self, place: int, outputs: Outputs) -> Iterator[Answered]:
        """The outputs that vary on a part of the images."""
        wanted = self.wanted(place)
        for number, own in outputs.items():
            for name, has in own.items():
                if (number, name) in self.distances:
                    yield Answered(has, wanted[number][name], self.distances[number, name])

    def error(self, place: int, outputs: Outputs) -> float:
        """The part of these images in the error."""
        return sum(each.distance.error(each.wanted, each.has) for each in self.answered(place, outputs))


def in_parts(images: Sequence[Given], most: int = TOGETHER) -> list[Given]:
    """Batches of at most so many images; tensors without a batch axis stay."""
    return [_some(batch, start, most) for batch in images for start in range(0, batch_size(*batch), most)]


def _some(batch: Given, start: int, most: int) -> Given:
    size = batch_size(*batch)

    def taken(tensor: Tensor) -> Tensor:
        return tensor[start : start + most] if tensor.dim() and tensor.shape[0] == size else tensor

    return Given(*map_tensors(batch, taken))
