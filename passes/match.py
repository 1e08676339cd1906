"""Match: a merge map for each channel space, from the moments that were observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.matching import MergeMap, evidence, match
from fxzip.moments import Moments


def match_spaces(
    spec: ChannelSpec,
    moments: Mapping[str, Moments],
    method: str,
    n_models: int,
    names: Collection[str],
    **options: Any,
) -> dict[str, MergeMap]:
    """The merge map of each of the named spaces.

    Spaces that are split into blocks (groups of a convolution, attention heads) are matched block by block
    first: the blocks of different models are assigned one to one by the best assignment of the channels in
    them, then ``method`` matches channels inside each set of assigned blocks.

    Args:
        spec: The channel spaces.
        moments: Of each space that was observed; a space without is matched with its blocks, or by position.
        method: As for `fxzip.matching.match`.
        n_models: Number of models N.
        names: The spaces to match; their parents are matched too.
        options: Of the method.
    """
    wanted = spec.with_parents(names)
    similar = _Computed(moments, lambda seen: seen.correlation.cpu())
    own = similar if evidence(method) == "correlation" else _Computed(moments, lambda seen: seen.covariance.cpu())
    maps: dict[str, MergeMap] = {}
    for space in spec.by_depth:
        if space.name in wanted:
            maps[space.name] = match_space(spec, space, own, similar, maps, method, n_models, options)
    return maps


class _Computed(Mapping[str, Tensor]):
    """A matrix of each space's moments, made when it is asked for: all at once would be as much as the moments."""

    def __init__(self, moments: Mapping[str, Moments], compute: Callable[[Moments], Tensor]) -> None:
        self._moments, self._compute = moments, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(self._moments[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def match_space(
    spec: ChannelSpec, space: ChannelSpace, own: Mapping[str, Tensor], similar: Mapping[str, Tensor],
    maps: Mapping[str, MergeMap], method: str, n_models: int, options: Mapping[str, Any],
) -> MergeMap:  # fmt: skip
    """The map of one space, those of its blocks being in ``maps``.

    Args:
        spec: The channel spaces.
        space: One of them.
        own: What ``method`` is given, by space.
        similar: Correlations, or other scores that grow with how alike two channels are, by space: blocks are assigned
            by the scores of the channels in them.
        maps: The maps that are there.
        method: As for `fxzip.matching.match`.
        n_models: Number of models N.
        options: Of the method.
    """
    within = list(spec.inside(space.name))
    similarity = (similar if within else own).get(space.name)
    if within:
        method, options = ("average" if method == "average" else "permute"), {}
    for below in within:
        if below.name in similar:
            scores = block_scores(similar[below.name], n_models, space.size)
            similarity = scores if similarity is None else similarity + scores
    if similarity is None:
        similarity, method, options = torch.eye(n_models * space.size), "average", {}
    if space.parent is None:
        return match(method, similarity, n_models=n_models, **options)
    return _match_in_blocks(similarity, maps[space.parent], method, n_models, options)


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


def _match_in_blocks(
    similarity: Tensor, parent: MergeMap, method: str, n_models: int, options: Mapping[str, Any]
) -> MergeMap:
    """Match channels inside each set of blocks that the parent's map puts together."""
    blocks = parent.size
    width = len(similarity) // (n_models * blocks)
    found: list[tuple[Tensor, MergeMap]] = []
    for block in range(blocks):
        members = (parent.assignment == block).nonzero().flatten()
        here = (members[:, None] * width + torch.arange(width)).reshape(-1)
        found.append((here, match(method, similarity[here][:, here], n_models=n_models, **options)))
    if all(inner.sparse is not None for _, inner in found):
        target = torch.empty(len(similarity), dtype=torch.int64)
        weight = torch.empty(len(similarity), dtype=torch.float64)
        for block, (here, inner) in enumerate(found):
            assert inner.sparse is not None
            target[here], weight[here] = block * width + inner.sparse[0], inner.sparse[1]
        return MergeMap(n_models, (target, weight))
    merge = torch.zeros(blocks * width, len(similarity), dtype=torch.float64)
    unmerge = torch.zeros(len(similarity), blocks * width, dtype=torch.float64)
    for block, (here, inner) in enumerate(found):
        there = torch.arange(block * width, (block + 1) * width)
        merge[there[:, None], here] = inner.merge
        unmerge[here[:, None], there] = inner.unmerge
    return MergeMap.from_matrices(merge, unmerge, n_models)
