"""The memory that a merge needs, told before the work, and kept to what a user allows.

It is estimated from sizes: of the networks' tensors, of the moments of each channel space, of the largest Gram matrix
that refit takes, and of the values that lie around one node for the least number of images. What an allowance leaves
beyond that goes to more images.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, fx

from fxzip.data.batches import batch_size
from fxzip.errors import OptionError
from fxzip.graphs import linear_of
from fxzip.settings import RefitOptions

if TYPE_CHECKING:
    from fxzip.prepared import Prepared

EXACT = 8
"""Bytes of a number in a sum."""
GRAMS = 4
"""Matrices of a layer's inputs by its inputs that are there at once: of two parts of the images, of all, a factor."""
MATCHES = 3
"""Matrices of one channel space that matching holds beside the moments."""
COPIES = 3
"""Networks that checking a merge holds at once, in float64 where they are small enough (`fxzip.passes.verify`)."""
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Need:
    """Bytes that a merge needs.

    Attributes:
        networks: The models, and the merged network.
        moments: Of all channel spaces.
        statistic: The largest matrix that is worked on, with what is worked on beside it.
        values: Inputs and values around one node, of the least number of images.
    """

    networks: int
    moments: int
    statistic: int
    values: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.networks + self.moments + self.statistic + self.values

    def __str__(self) -> str:
        parts = ("networks", self.networks), ("moments", self.moments), ("the largest statistic", self.statistic)
        shown = ", ".join(f"{name} {in_bytes(size)}" for name, size in (*parts, ("values", self.values)))
        return f"{in_bytes(self.total)} ({shown})"


def in_bytes(size: float) -> str:
    """A number of bytes in words."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size:.0f} bytes"


def parse_memory(given: object) -> int | None:
    """Bytes, from a number or from ``"4GB"``, ``"512 MiB"``; None: no bound.

    Raises:
        OptionError: It is neither.
    """
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    found = _SIZE.fullmatch(given) if isinstance(given, str) else None
    if found is None or not float(found[1]):
        raise OptionError(f'memory={given!r}: give a size like "4GB", "512MB" or "2GiB", or a number of bytes')
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def need_of(prepared: Prepared, refit: RefitOptions | None) -> Need:
    """What a merge needs at the least.

    Args:
        prepared: The networks.
        refit: How layers are solved; None: not at all.
    """
    modules, count = prepared.alignment.modules, len(prepared.names)
    sizes = [sum(t.nbytes for t in (*module.parameters(), *module.buffers())) for module in modules]
    squares = [EXACT * (count * space.size) ** 2 for space in prepared.spec.spaces]
    gram = max(map(_gram, _layers(modules[0])), default=0) if refit is not None else 0
    statistic = max(GRAMS * gram, MATCHES * max(squares, default=0), COPIES * 2 * max(sizes))
    images = refit.least_images if refit is not None else batch_size(*prepared.spec.example)
    return Need(sum(sizes) + max(sizes), sum(squares), statistic, images * _around(modules[0]) * (count + 1))


def bounded(prepared: Prepared, allowed: int | None, refit: RefitOptions | None) -> RefitOptions | None:
    """How to refit within an allowance: with as many images as it leaves room for.

    Raises:
        OptionError: It is less than the least that the merge needs, of which the message tells the parts.
    """
    if allowed is None:
        return refit
    need = need_of(prepared, refit)
    if need.total > allowed:
        raise OptionError(
            f"memory={in_bytes(allowed)}: this merge needs some {need} at the least; allow more, or merge fewer "
            "layers (cut=...)"
        )
    return None if refit is None else replace(refit, memory=min(refit.memory, allowed - need.total + need.values))


def _layers(module: fx.GraphModule) -> list[tuple[int, int]]:
    """The inputs of each layer, and in how many groups they are."""
    found = []
    for node in module.graph.nodes:
        linear = linear_of(module, node)
        if linear is not None:
            split = linear.contraction.split
            found.append((math.prod(split[axis] for axis in linear.contraction.inputs), linear.contraction.count))
    return found


def _gram(layer: tuple[int, int]) -> int:
    inputs, groups = layer
    return EXACT * groups * inputs**2


def _around(module: fx.GraphModule) -> int:
    """Bytes of the values around the widest node, for one image: its inputs, its own, and what it should be."""
    widest = 0
    for node in module.graph.nodes:
        sizes = [_each(source) for source in (*node.all_input_nodes, node)]
        widest = max(widest, sum(sizes) + _each(node))
    return widest


def _each(node: fx.Node) -> int:
    """Bytes of a node's value for one image, as it was traced."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim() or node.op == "get_attr":
        return 0
    sizes = [size for size in value.shape[1:] if isinstance(size, int)]
    return value.element_size() * math.prod(sizes)
