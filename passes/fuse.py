"""Fuse: the weights of the trunk, W* = M blockdiag(W_1, ..., W_N) U, by the sites of the analysis.

Written as a sum over the models, W* = Σ_p M_p W_p U_p with M = [M_1 ... M_N] and U = [U_1; ...; U_N]: M acts
where a parameter produces channels, U where it contracts them (arXiv 2305.03053, section 4.2). What lies in no
space (frozen channels, scalars) is averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxzip.channels import ChannelSpec, Site
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
        A tensor of the first one's shape, dtype and device, computed in float64.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    ordered = sorted(sites, key=lambda pair: pair[0].rows is not None)
    share = _shares(first, ordered)
    total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    weight = torch.zeros_like(total) if share is None else None
    for model, tensor in enumerate(tensors):
        part = tensor.detach().to(first.device, torch.float64)
        total += _transformed(part, ordered, model) * (1.0 if share is None else share / len(tensors) + (1 - share))
        if weight is not None:
            weight += _transformed(torch.ones_like(part), [s for s in ordered if s[0].role == "produce"], model)
    if weight is not None:
        total /= weight
    return total.to(first.dtype)


def _shares(tensor: Tensor, sites: Sequence[Mapped]) -> Tensor | None:
    """1 where no space produces an element (it is averaged), 0 where M sets its weight; None to count weights.

    Where a parameter produces channels along two axes the weights of M on both do not sum to one.
    """
    produced = {site.axis for site, _ in sites if site.role == "produce" and site.rows is None}
    if len(produced) > 1:
        return None
    share = torch.ones(tensor.shape, dtype=torch.float64, device=tensor.device)
    for site, _ in sites:
        if site.role == "produce" and site.rows is None:
            share.index_fill_(site.axis, site.index.reshape(-1).to(tensor.device), 0)
        elif site.role == "produce" and site.rows is not None:
            share[site.rows.reshape(-1).to(tensor.device)] = 0
    return share


def _transformed(tensor: Tensor, sites: Sequence[Mapped], model: int) -> Tensor:
    for site, merge_map in sites:
        matrix = part_of(merge_map, model, site.role).to(tensor.device)
        index = site.index.to(tensor.device)
        if site.rows is None:
            tensor = _applied(tensor, site.axis, index, matrix)
        else:
            tensor = _applied_in_rows(tensor, site.axis, index, site.rows.to(tensor.device), matrix)
    return tensor


def part_of(merge_map: MergeMap, model: int, role: str) -> Tensor:
    """M_p for a producing site, U_pᵀ for a contracting one; both (merged channels × the model's channels)."""
    size = merge_map.merge.shape[1] // merge_map.n_models
    here = slice(model * size, (model + 1) * size)
    return merge_map.merge[:, here] if role == "produce" else merge_map.unmerge[here].T


def _applied(tensor: Tensor, axis: int, index: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix to the channels that lie along an axis at ``index`` (channels, copies)."""
    channels, copies = index.shape
    part = tensor.index_select(axis, index.reshape(-1)).movedim(axis, 0)
    mixed = mix(matrix, part.reshape(channels, -1)).reshape(channels * copies, *part.shape[1:])
    return tensor.index_copy(axis, index.reshape(-1), mixed.movedim(0, axis))


def _applied_in_rows(tensor: Tensor, axis: int, index: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix that maps blocks to blocks, each inside its own rows of axis 0.

    The rows are those of the merged blocks already, so what is left of the matrix is how it acts inside: the
    sum over source blocks, of which only one is not zero.
    """
    blocks, width = len(rows), len(index) // len(rows)
    inner = matrix.reshape(blocks, width, blocks, width).sum(2)
    result = tensor.clone()
    for block in range(blocks):
        here = index[block * width : (block + 1) * width]
        result[rows[block]] = _applied(tensor[rows[block]], axis, here, inner[block])
    return result


def mix(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix @ rows``, by adding rows up where each goes to one place only, as channels mostly do."""
    if bool(((matrix != 0).sum(0) <= 1).all()):
        scale, target = matrix.abs().max(0)
        scale = matrix[target, torch.arange(matrix.shape[1], device=matrix.device)]
        result = torch.zeros(matrix.shape[0], *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        return result.index_add_(0, target, rows * scale[:, None].to(rows.dtype))
    return matrix.to(rows.dtype) @ rows
