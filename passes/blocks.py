"""Blocks: which groups of channels of the models correspond, and which are left out or stay apart.

Blocks (groups of a convolution, attention heads) are merged as wholes, one of each model. Where there are to be fewer,
those are left out that carry the least variance; where there are to be more, those that fit worst stay apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.matching import MergeMap, match
from fxzip.moments import Moments


def block_scores(correlation: Tensor, n_models: int, blocks: int) -> Tensor:
    """How alike blocks of channels are: the mean correlation of the best assignment of their channels.

    Args:
        correlation: (Σn × Σn), channels of each model ordered by block.
        n_models: Number of models N.
        blocks: Blocks in each model.

    Returns:
        (N·blocks × N·blocks); within a model 0, since blocks of one model are not merged.
    """
    total = n_models * blocks
    width = len(correlation) // total
    tiles = correlation.reshape(total, width, total, width).permute(0, 2, 1, 3)
    if width == 1:
        scores = tiles[:, :, 0, 0].clone()
    else:
        scores = torch.zeros(total, total, dtype=correlation.dtype)
        for i in range(total):
            for j in range((i // blocks + 1) * blocks, total):
                rows, columns = linear_sum_assignment(tiles[i, j].numpy(), maximize=True)
                scores[i, j] = scores[j, i] = tiles[i, j][rows, columns].mean()
    for model in range(n_models):
        own = slice(model * blocks, (model + 1) * blocks)
        scores[own, own] = 0
    return scores


def match_blocks(
    spec: ChannelSpec, space: ChannelSpace, moments: Mapping[str, Moments], n_models: int, size: int, method: str
) -> MergeMap:
    """The map of a space of blocks to another number of them.

    Args:
        spec: The channel spaces.
        space: The blocks.
        moments: What was observed, by space; channels in blocks that were not observed do not count.
        n_models: Number of models N.
        size: How many merged blocks there are to be.
        method: ``average`` merges blocks of the same number; any other the best assignment.
    """
    total = n_models * space.size
    scores, power = torch.zeros(total, total, dtype=torch.float64), torch.zeros(total, dtype=torch.float64)
    for below in (space, *spec.inside(space.name)):
        if below.name in moments:
            seen = moments[below.name]
            scores += block_scores(seen.correlation.cpu(), n_models, space.size)
            power += _shares(seen.covariance.diagonal().cpu(), n_models, total)
    groups = match("average" if method == "average" else "permute", scores, n_models=n_models).assignment
    if size < space.size:
        carried = torch.zeros(space.size, dtype=torch.float64).index_add_(0, groups, power)
        return _left_out(groups, carried.argsort(descending=True, stable=True)[:size].sort().values, n_models)
    first = torch.empty(space.size, dtype=torch.int64)
    first[groups[: space.size]] = torch.arange(space.size)
    others = torch.arange(space.size, total)
    worst = others[scores[first[groups[others]], others].argsort(stable=True)[: size - space.size]]
    groups = groups.clone()
    groups[worst.sort().values] = torch.arange(space.size, size)
    return MergeMap.from_assignment(groups, n_models)


def _shares(variance: Tensor, n_models: int, total: int) -> Tensor:
    """The share of each block in its model's variance, (N·blocks,)."""
    blocks = variance.reshape(total, -1).sum(1).reshape(n_models, -1)
    return (blocks / blocks.sum(1, keepdim=True).clamp(min=torch.finfo(blocks.dtype).tiny)).reshape(-1)


def _left_out(groups: Tensor, kept: Tensor, n_models: int) -> MergeMap:
    """The map that keeps some groups; the channels of all others are not found again."""
    found: Any = torch.zeros(len(kept), len(groups), dtype=torch.float64)
    for place, group in enumerate(kept.tolist()):
        found[place, groups == group] = 1.0
    return MergeMap.from_matrices(found / found.sum(1, keepdim=True), found.T.clone(), n_models)
