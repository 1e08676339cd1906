"""Match: a merge map for each channel space, from the moments that were observed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.matching import MergeMap, match
from fxzip.moments import Moments
from fxzip.passes.permute import by_depth


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
    wanted = _with_parents(spec, names)
    deciding = wanted | {below.name for name in wanted for below in _inside(spec, name)}
    correlations = {name: moments[name].correlation.cpu() for name in deciding if name in moments}
    maps: dict[str, MergeMap] = {}
    for space in by_depth(spec):
        if space.name in wanted:
            maps[space.name] = _match_space(spec, space, correlations, maps, method, n_models, options)
    return maps


def _with_parents(spec: ChannelSpec, names: Collection[str]) -> set[str]:
    wanted = set(names)
    for space in reversed(by_depth(spec)):
        if space.name in wanted and space.parent is not None:
            wanted.add(space.parent)
    return wanted


def _inside(spec: ChannelSpec, name: str) -> Iterator[ChannelSpace]:
    """The spaces whose channels lie in blocks of a space, however deep."""
    for child in spec.children(name):
        yield child
        yield from _inside(spec, child.name)


def _match_space(
    spec: ChannelSpec, space: ChannelSpace, correlations: Mapping[str, Tensor], maps: Mapping[str, MergeMap],
    method: str, n_models: int, options: Mapping[str, Any],
) -> MergeMap:  # fmt: skip
    inside = list(_inside(spec, space.name))
    similarity = correlations.get(space.name)
    if inside:
        seen = [correlations[below.name] for below in inside if below.name in correlations]
        scores = [block_scores(correlation, n_models, space.size) for correlation in seen]
        if scores:
            similarity = sum(scores, torch.zeros_like(scores[0]) if similarity is None else similarity)
        method, options = ("average" if method == "average" else "permute"), {}
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
    blocks = parent.merge.shape[0]
    width = len(similarity) // (n_models * blocks)
    assignment = torch.empty(n_models * blocks * width, dtype=torch.int64)
    for block in range(blocks):
        members = (parent.assignment == block).nonzero().flatten()
        here = (members[:, None] * width + torch.arange(width)).reshape(-1)
        inner = match(method, similarity[here][:, here], n_models=n_models, **options)
        assignment[here] = block * width + inner.assignment
    return MergeMap.from_assignment(assignment, n_models)
