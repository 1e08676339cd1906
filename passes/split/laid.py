"""Merged channels at other places than the models': mixing where a space changes its number of channels.

All spaces along an axis are mixed at once, since each of them moves the others. Positions that lie in no space keep
their order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxzip.channels import ChannelSpec
from fxzip.errors import AlignmentError

if TYPE_CHECKING:
    from fxzip.channels import Located
    from fxzip.passes.split.fuse import Mixing


@dataclass(frozen=True, eq=False)
class Laid:
    """Where channels come to lie.

    Attributes:
        index: Their positions in the row-major product of the axes, int64 (channels, copies).
        sizes: Of these axes.
        rows: As of `fxzip.channels.Site`.
    """

    index: Tensor
    sizes: tuple[int, ...]
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Move:
    """The channels of one space, from where they lie to where they come to lie."""

    index: Tensor
    mixing: Mixing
    into: Laid


def laid_in(spec: ChannelSpec, node: str, wanted: Located) -> Laid:
    """Where the channels of a space lie in a node's output, in the network of another spec."""
    space, axes, _ = wanted
    for other, _, index in spec.locate(node):
        if other.name == space.name:
            return Laid(index, sizes_along(spec, node, axes))
    raise AlignmentError(f"the channels of {space.name} are not found in {node} once their number has changed")


def sizes_along(spec: ChannelSpec, node: str, axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of axes of a node's output along which channels lie."""
    factors = spec.layout.factors[node]
    return tuple(max(factor.shape[axis] for factor in factors) for axis in axes)


def moved_along(tensor: Tensor, axes: tuple[int, ...], moves: Sequence[Move]) -> Tensor:
    """The channels that lie along axes mixed, and put where they come to lie; these axes get other sizes.

    Raises:
        AlignmentError: Several spaces share positions.
    """
    front = tuple(range(len(axes)))
    moved = tensor.movedim(axes, front)
    flat, sizes = moved.flatten(0, len(axes) - 1), moves[0].into.sizes
    result = flat.new_zeros(math.prod(sizes), *flat.shape[1:])
    old, new = _rest((move.index for move in moves), len(flat)), _rest((m.into.index for m in moves), len(result))
    if len(old) != len(new):
        raise AlignmentError("channels of several spaces share their positions, and one of these changes its number")
    result[new.to(flat.device)] = flat[old.to(flat.device)]
    for move in moves:
        here, there = (index.to(flat.device) for index in (move.index, move.into.index))
        rows = flat[here.reshape(-1)].unflatten(0, tuple(here.shape))
        mixed = move.mixing(rows if move.mixing.moves else rows.flatten(1))
        result[there.reshape(-1)] = mixed.reshape(there.numel(), *flat.shape[1:])
    laid: Tensor = result.unflatten(0, sizes).movedim(front, axes)
    return laid


def _rest(indices: Iterable[Tensor], size: int) -> Tensor:
    """The positions that no index has, in order."""
    free = torch.ones(size, dtype=torch.bool)
    for index in indices:
        free[index.cpu().reshape(-1)] = False
    return free.nonzero().flatten()


def move_in_rows(tensor: Tensor, result: Tensor, axis: int, index: Tensor, into: Laid, matrix: Tensor) -> None:
    """Write what a matrix that maps blocks to blocks makes of a grouped weight's channels, each block in its own rows.

    The rows are those of the merged blocks already, so what is left of the matrix is how it acts inside: the sum over
    source blocks, of which only one is not zero. Where a space's channels lie may differ from block to block, so that
    another's lie there: all spaces are read from one tensor and written into another.

    Args:
        tensor: One model's weight, with the merged rows.
        result: Where the merged channels are written; of the same shape, or of other numbers of channels.
        axis: Where the channels lie, inside groups.
        index: Where the model's lie, (channels, copies), ordered by block.
        into: Where the merged ones come to lie.
        matrix: M or Uᵀ of the model, (merged channels × channels).
    """
    assert into.rows is not None
    blocks = len(into.rows)
    width = len(into.index) // blocks
    parts = matrix.reshape(blocks, width, -1, width)
    inner, source = parts.sum(2), parts.abs().sum((1, 3)).argmax(1)
    new, old = into.index.reshape(blocks, width, -1), index.reshape(parts.shape[2], width, -1)
    for block, rows in enumerate(into.rows.to(tensor.device)):
        here, there = new[block].to(tensor.device), old[source[block]].to(tensor.device)
        part = tensor[rows].movedim(axis, 0)
        mixed = torch.tensordot(inner[block].to(part), part[there.reshape(-1)].unflatten(0, tuple(there.shape)), 1)
        laid = result[rows].movedim(axis, 0).index_copy(0, here.reshape(-1), mixed.flatten(0, 1))
        result[rows] = laid.movedim(0, axis)


def by_axes(moves: Iterable[tuple[tuple[int, ...], Move]]) -> dict[tuple[int, ...], list[Move]]:
    """Moves that belong together."""
    found: dict[tuple[int, ...], list[Move]] = defaultdict(list)
    for axes, move in moves:
        found[axes].append(move)
    return found
