"""Fuse: the weights of the trunk, W* = M blockdiag(W_1, ..., W_N) U, by the sites of the analysis.

Written as a sum over the models, W* = Σ_p M_p W_p U_p with M = [M_1 ... M_N] and U = [U_1; ...; U_N]: M acts
where a parameter produces channels, U where it contracts them (arXiv 2305.03053, section 4.2). What lies in no
space (frozen channels, scalars) is averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzip.channels import ChannelSpec, Role, Site
from fxzip.matching import MergeMap

Mapped = tuple[Site, MergeMap]


def sites_by_parameter(spec: ChannelSpec, maps: Mapping[str, MergeMap]) -> dict[str, list[Mapped]]:
    """For each parameter the sites of the spaces that have a map."""
    found: dict[str, list[Mapped]] = defaultdict(list)
    for space in spec.spaces:
        if space.name in maps:
            for site in space.sites:
                found[site.parameter].append((site, maps[space.name]))
    return found


def fuse_parameter(tensors: Sequence[Tensor], sites: Sequence[Mapped]) -> Tensor:
    """One merged parameter.

    Args:
        tensors: The parameter of each model; all of one shape. Integers are taken from the first model.
        sites: Where spaces touch it, with their maps.

    Returns:
        A tensor of the first one's shape, dtype and device, computed in float32 or better.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    work = torch.promote_types(first.dtype, torch.float32)
    total: Tensor | None = None
    for model, tensor in enumerate(tensors):
        part = transformed(tensor.detach().to(first.device, work), sites, model)
        total = part.clone() if total is None else total.add_(part)
    assert total is not None
    return total.mul_(_weights(total, sites, len(tensors))).to(first.dtype)


def _weights(tensor: Tensor, sites: Sequence[Mapped], n_models: int) -> Tensor:
    """What the sum over models is multiplied by: 1 where M has weighted it, 1/N where no space produces it.

    Where a parameter produces channels along several axes, M on each of them, the weights are counted instead.
    """
    produced = [pair for pair in sites if pair[0].role == "produce"]
    axes = {site.axis for site, _ in produced}
    if len(axes) > 1:
        ones = torch.ones_like(tensor)
        count = sum((transformed(ones, produced, model) for model in range(n_models)), torch.zeros_like(ones))
        return torch.where(count > 0, 1 / count, 0.0)  # no model has both channels where each is kept from another
    weights = torch.full((1,) * tensor.dim(), 1 / n_models, dtype=tensor.dtype, device=tensor.device)
    for site, _ in produced:
        axis, index = (site.axis, site.index) if site.rows is None else (0, site.rows)
        size = [tensor.shape[a] if a == axis else weights.shape[a] for a in range(tensor.dim())]
        weights = weights.expand(size).index_fill(axis, index.reshape(-1).to(tensor.device), 1.0)
    return weights


def transformed(tensor: Tensor, sites: Sequence[Mapped], model: int) -> Tensor:
    """One model's parameter with M_p and U_p applied at its sites, those inside groups last."""
    for site, merge_map in sorted(sites, key=lambda pair: pair[0].rows is not None):
        index = site.index.to(tensor.device)
        if site.parameter.endswith("running_var"):
            merge_map = merge_map.positive
        if site.rows is None:
            tensor = applied(tensor, site.axis, index, Mixing.of(merge_map, model, site.role))
        else:
            matrix = merge_map.part(model, site.role)
            tensor = _applied_in_rows(tensor, site.axis, index, site.rows.to(tensor.device), matrix)
    return tensor


def applied(tensor: Tensor, axis: int, index: Tensor, mixing: Mixing, into: Tensor | None = None) -> Tensor:
    """Mix the channels that lie along an axis at ``index`` (channels, copies); they go ``into`` (default: there)."""
    channels, copies = index.shape
    flat = index.reshape(-1)
    if into is not None and not torch.equal(into, index):
        taken = tensor.index_select(axis, flat)
        tensor, flat = tensor.index_copy(axis, into.reshape(-1), taken), into.reshape(-1)
    whole = len(flat) == tensor.shape[axis] and torch.equal(flat, torch.arange(len(flat), device=flat.device))
    part = (tensor if whole else tensor.index_select(axis, flat)).movedim(axis, 0)
    mixed = mixing(part.reshape(channels, -1)).reshape(channels * copies, *part.shape[1:]).movedim(0, axis)
    return mixed if whole else tensor.index_copy(axis, flat, mixed)


def _applied_in_rows(tensor: Tensor, axis: int, index: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix that maps blocks to blocks, each inside its own rows of axis 0.

    The rows are those of the merged blocks already, so what is left of the matrix is how it acts inside: the
    sum over source blocks, of which only one is not zero.
    """
    blocks, width = len(rows), len(index) // len(rows)
    parts = matrix.reshape(blocks, width, blocks, width)
    inner, source = parts.sum(2), parts.abs().sum((1, 3)).argmax(1)  # channels may lie otherwise in the source block
    result, places = tensor.clone(), index.reshape(blocks, width, -1)
    for block in range(blocks):
        there, mixing = places[source[block]], Mixing(width, matrix=inner[block])
        result[rows[block]] = applied(tensor[rows[block]], axis, there, mixing, into=places[block])
    return result


def along_axes(
    spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, model: int, role: Role, others: float = 1.0
) -> dict[int, Tensor]:
    """How one model's channels in a node's output are mixed: a matrix for each axis where there are some, float64.

    Args:
        spec: The channel spaces.
        maps: The maps of those that are merged.
        node: The node, by the first model's name; no space of it lies along several axes at once.
        model: The model.
        role: ``produce`` for M_p, (merged positions, the model's); ``contract`` for U_p, (the model's, merged ones).
        others: What positions are multiplied by that are in no merged space.
    """
    found: dict[int, Tensor] = {}
    for space, axes, index in spec.locate(node):
        if space.name not in maps or space.size == 1:
            continue
        (axis,) = axes
        size = max(factor.shape[axis] for factor in spec.layout.factors[node])
        matrix = found.setdefault(axis, others * torch.eye(size, dtype=torch.float64))
        part = maps[space.name].part(model, role)
        for copy in index.T:
            matrix[copy[:, None], copy] = part if role == "produce" else part.T
    return found


@dataclass(frozen=True, eq=False)
class Mixing:
    """A matrix (size × channels) applied to the rows of a tensor: M_p or U_pᵀ of one model.

    Where each channel goes to one row only, as it mostly does, rows are added up instead of multiplied.
    """

    size: int
    matrix: Tensor | None = None
    target: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, merge_map: MergeMap, model: int, role: Role) -> Mixing:
        """M_p for a producing site, U_pᵀ for a contracting one."""
        if merge_map.sparse is None:
            return cls(merge_map.size, merge_map.part(model, role))
        here = slice(model * merge_map.size, (model + 1) * merge_map.size)
        target, weight = merge_map.sparse
        return cls(merge_map.size, None, target[here], weight[here] if role == "produce" else None)

    def __call__(self, rows: Tensor) -> Tensor:
        """Mix rows: (channels × n) to (size × n), in their dtype; without a matrix they may have more axes."""
        if self.target is None:
            assert self.matrix is not None
            return self.matrix.to(rows) @ rows
        result = torch.zeros(self.size, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        target = self.target.to(rows.device)
        if self.scale is None:
            return result.index_add_(0, target, rows)
        if bool((self.scale == self.scale[0]).all()):
            return result.index_add_(0, target, rows, alpha=float(self.scale[0]))
        scale = self.scale.to(rows).reshape(-1, *[1] * (rows.dim() - 1))
        return result.index_add_(0, target, rows * scale)
