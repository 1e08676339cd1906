"""Fuse: the weights of the trunk, W* = M blockdiag(W_1, ..., W_N) U, by the sites of the analysis.

Written as a sum over the models, W* = Σ_p M_p W_p U_p with M = [M_1 ... M_N] and U = [U_1; ...; U_N]: M acts
where a parameter produces channels, U where it contracts them (arXiv 2305.03053, section 4.2). What lies in no
space (frozen channels, scalars) is averaged.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec, Role, Site
from fxzip.matching import MergeMap
from fxzip.passes.split.laid import Laid, Move, by_axes, move_in_rows, moved_along


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a merged space lie in a tensor.

    Attributes:
        map: The space's map.
        axes: The axes along which its channels lie; one for a parameter.
        index: Their positions in the row-major product of these axes, int64 (channels, copies).
        role: ``produce`` (M goes there) or ``contract`` (U).
        rows: As of a `Site`: the rows of axis 0 of each block, int64 (blocks, rows); None for all.
        into: Where the merged channels come to lie; None where there are as many and they lie at the same places.
    """

    map: MergeMap
    axes: tuple[int, ...]
    index: Tensor
    role: Role = "produce"
    rows: Tensor | None = None
    into: Laid | None = None

    @classmethod
    def of_site(cls, site: Site, merge_map: MergeMap, into: Laid | None = None) -> Place:
        """The place of a space's channels in a parameter."""
        own = merge_map.positive if site.statistic == "variance" else merge_map
        return cls(own, (site.axis,), site.index, site.role, site.rows, into)

    def mix(self, tensor: Tensor, model: int) -> Tensor:
        """One model's tensor with M_p or U_p applied here; not inside rows."""
        return mixed_along(tensor, self.axes, self.index.to(tensor.device), Mixing.of(self.map, model, self.role))

    def mix_in_rows(self, tensor: Tensor, result: Tensor, model: int) -> None:
        """Write into a result what M_p or U_p makes of a tensor's channels here, in the rows of each block."""
        into = self.into or Laid(self.index, (), self.rows)
        move_in_rows(tensor, result, self.axes[0], self.index, into, self.map.part(model, self.role))

    @property
    def finding(self) -> Place:
        """In the place of M the sum of each model's channels that are found again from the merged one."""
        found = self.map.assignment
        return replace(
            self,
            map=MergeMap(self.map.n_models, (found, torch.ones(len(found), dtype=torch.float64)), n_out=self.map.size),
        )

    @property
    def touched(self) -> tuple[int, ...]:
        """The axes on which it depends whether M has weighted an element."""
        return self.axes if self.rows is None else (0, *self.axes)

    def weighted(self, like: Tensor) -> Tensor:
        """Which elements of a tensor M has weighted: bool, of size 1 on the axes that are not touched."""
        axes = self.touched
        sizes = [like.shape[axis] for axis in axes]
        here = torch.zeros(math.prod(sizes), dtype=torch.bool)
        index, rows = (self.index, self.rows) if self.into is None else (self.into.index, self.into.rows)
        if rows is None:
            here[index.cpu().reshape(-1)] = True
        else:
            inside = index.cpu().reshape(len(rows), 1, -1)  # those of each block, in each of its rows
            here[(rows.cpu()[:, :, None] * sizes[1] + inside).reshape(-1)] = True
        laid = here.reshape(sizes + [1] * (like.dim() - len(axes)))
        return laid.movedim(tuple(range(len(axes))), axes).to(like.device)


def places_by_parameter(
    spec: ChannelSpec, maps: Mapping[str, MergeMap], into: Callable[[ChannelSpace, Site], Laid] | None = None
) -> dict[str, list[Place]]:
    """For each parameter the places of the spaces that have a map.

    Args:
        spec: The channel spaces.
        maps: The maps.
        into: Where the merged channels of a space come to lie; None: where the models' do.
    """
    found: dict[str, list[Place]] = defaultdict(list)
    for space in spec.spaces:
        if space.name in maps:
            for site in space.sites:
                laid = None if into is None else into(space, site)
                found[site.parameter].append(Place.of_site(site, maps[space.name], laid))
    return found


def fuse_parameter(tensors: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
    """One merged parameter.

    Args:
        tensors: The parameter of each model; all of one shape. Integers are taken from the first model.
        places: Where spaces touch it.

    Returns:
        A tensor of the merged shape, and the first one's dtype and device, computed in float32 or better.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    work = torch.promote_types(first.dtype, torch.float32)
    return merged([tensor.detach().to(first.device, work) for tensor in tensors], places).to(first.dtype)


def merged(values: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
    """The sum over the models of what M and U make of their tensors; what lies in no space is averaged."""
    produced = [place for place in places if place.role == "produce"]
    if len({place.axes for place in produced}) > 1 or _overlap(produced):
        return _merged_along_several(values, places)
    total = _summed(values, places)
    weights = _weights(total, produced, len(values))
    return total if weights is None else total * weights


def _overlap(places: Sequence[Place]) -> bool:
    """Whether places along one axis have elements in common: tokens by channels, seen as one axis."""
    index = [place.index.reshape(-1) for place in places if place.rows is None]
    return len(index) > 1 and len(torch.cat(index).unique()) < sum(map(len, index))


def _summed(values: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
    return reduce(torch.add, (transformed(value, places, model) for model, value in enumerate(values)))


def transformed(tensor: Tensor, places: Sequence[Place], model: int) -> Tensor:
    """One model's tensor with M_p and U_p applied at all places, those inside groups last."""
    laid = [place for place in places if place.into is not None and place.rows is None]
    moves = ((p.axes, Move(p.index, Mixing.of(p.map, model, p.role), p.into)) for p in laid if p.into is not None)
    for axes, together in by_axes(moves).items():
        tensor = moved_along(tensor, axes, together)
    for place in places:
        if place.into is None and place.rows is None:
            tensor = place.mix(tensor, model)
    inside = [place for place in places if place.rows is not None]
    result = tensor.clone() if inside else tensor
    for place in inside:
        place.mix_in_rows(tensor, result, model)
    return result


def _weights(total: Tensor, produced: Sequence[Place], n_models: int) -> Tensor | None:
    """What the sum over models is multiplied by: 1 where M has weighted it, 1/N where no space produces it.

    None for 1 everywhere.
    """
    weights = total.new_full((1,) * total.dim(), 1 / n_models)
    for place in produced:
        weights = torch.where(place.weighted(total), 1.0, weights)
    return None if bool((weights == 1).all()) else weights


def _merged_along_several(values: Sequence[Tensor], places: Sequence[Place]) -> Tensor:
    """Elements that several M produce, along an axis each or along one: the sum over models divided by its weights.

    Where each of an element's channels is kept from another model, no model has both. It is taken from a model that one
    of them is kept from, at those of its channels along the other axes that are found again from the other.
    """
    produced = [place for place in places if place.role == "produce"]
    others = [place for place in places if place.role != "produce"]
    touched = {axis for place in produced for axis in place.touched}
    ones = values[0].new_ones([size if axis in touched else 1 for axis, size in enumerate(values[0].shape)])

    def summed(producing: Sequence[Place]) -> tuple[Tensor, Tensor]:
        return _summed(values, [*others, *producing]), _summed([ones] * len(values), producing)

    total, count = summed(produced)
    if bool((count <= 0).any()):
        parts = [summed([p if p is own else p.finding for p in produced]) for own in produced]
        found, times = (torch.stack(side).sum(0) for side in zip(*parts, strict=True))
        total, count = torch.where(count > 0, total, found), torch.where(count > 0, count, times)
    return total * torch.where(count > 0, 1 / count, 0.0)


def mixed_along(tensor: Tensor, axes: tuple[int, ...], index: Tensor, mixing: Mixing) -> Tensor:
    """Mix the channels that lie along axes at ``index`` (channels, copies) of their row-major product."""
    front = tuple(range(len(axes)))
    moved = tensor.movedim(axes, front)
    flat, here = moved.flatten(0, len(axes) - 1), index.reshape(-1)
    whole = len(here) == len(flat) and torch.equal(here, torch.arange(len(here), device=here.device))
    if whole and len(axes) == index.shape[1] == 1 and mixing.moves:
        return mixing(tensor, axes[0])  # as they lie: much faster
    rows = (flat if whole else flat[here]).unflatten(0, tuple(index.shape))
    mixed = mixing(rows if mixing.moves else rows.flatten(1)).reshape(len(here), *flat.shape[1:])
    laid: Tensor = (mixed if whole else flat.index_copy(0, here, mixed)).unflatten(0, moved.shape[: len(axes)])
    return laid.movedim(front, axes)


@dataclass(frozen=True, eq=False)
class Mixing:
    """A matrix (size × channels) applied to the rows of a tensor: M_p, U_pᵀ or U_p of one model.

    Where each channel goes to one row only, as it mostly does, rows are added up instead of multiplied; where each row
    is one of the channels, they are gathered.
    """

    size: int
    matrix: Tensor | None = None
    target: Tensor | None = None
    scale: Tensor | None = None
    source: Tensor | None = None

    @classmethod
    def of(cls, merge_map: MergeMap, model: int, role: Role) -> Mixing:
        """M_p for a producing site, U_pᵀ for a contracting one."""
        if merge_map.sparse is None:
            return cls(merge_map.size, merge_map.part(model, role))
        here = slice(model * merge_map.width, (model + 1) * merge_map.width)
        target, weight = merge_map.sparse
        return cls(merge_map.size, None, target[here], weight[here] if role == "produce" else None)

    @classmethod
    def back(cls, merge_map: MergeMap, model: int) -> Mixing:
        """U_p: a model's channels from the merged ones."""
        if merge_map.sparse is None:
            return cls(merge_map.width, merge_map.part(model, "contract").T)
        return cls(merge_map.width, source=merge_map.sparse[0][model * merge_map.width :][: merge_map.width])

    @property
    def moves(self) -> bool:
        """Whether it is done without a product of matrices."""
        return self.matrix is None

    def __call__(self, rows: Tensor, axis: int = 0) -> Tensor:
        """Mix the rows of a tensor, which lie along an axis, in its dtype; with a matrix it is (channels × n)."""
        if self.source is not None:
            return rows.index_select(axis, self.source.to(rows.device))
        if self.target is None:
            assert self.matrix is not None
            return self.matrix.to(rows) @ rows
        target = self.target.to(rows.device)
        alpha = 1.0 if self.scale is None else float(self.scale[0])
        if self.scale is not None and not bool((self.scale == alpha).all()):
            scale, alpha = self.scale.to(rows).reshape(-1, *[1] * (rows.dim() - 1 - axis % rows.dim())), 1.0
            rows = rows * scale
        if len(target) == self.size and len(target.unique()) == self.size:  # each goes to a row of its own
            moved = rows.index_select(axis, target.argsort())
            return moved if alpha == 1 else moved.mul_(alpha)
        sizes = [self.size if place == axis % rows.dim() else size for place, size in enumerate(rows.shape)]
        return rows.new_zeros(sizes).index_add_(axis, target, rows, alpha=alpha)
