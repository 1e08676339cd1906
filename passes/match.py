"""Match: a merge map for each channel space, from the moments that were observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.matching import MergeMap, elsewhere, evidence, match
from fxzip.moments import Moments
from fxzip.passes.blocks import block_scores, match_blocks


def match_spaces(
    spec: ChannelSpec,
    moments: Mapping[str, Moments],
    method: str,
    n_models: int,
    names: Collection[str],
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, MergeMap]:
    """The merge map of each of the named spaces.

    Spaces that are split into blocks (groups of a convolution, attention heads) are matched block by block
    first: the blocks of different models are assigned one to one by the best assignment of the channels in
    them, then ``method`` matches channels inside each set of assigned blocks. Where there are to be more or fewer
    blocks, they stay apart or are left out as wholes (`fxzip.passes.blocks`).

    Args:
        spec: The channel spaces.
        moments: Of each space that was observed; a space without is matched with its blocks, or by position.
        method: As for `fxzip.matching.match`.
        n_models: Number of models N.
        names: The spaces to match; their parents are matched too.
        sizes: How many merged channels each space is to have that lies in no other's blocks; as many as a model where
            it is left out.
        options: Of the method.
    """
    wanted = spec.with_parents(names)
    similar = _Computed(moments, lambda seen: seen.correlation.cpu())
    own = similar if evidence(method) == "correlation" else _Computed(moments, lambda seen: seen.covariance.cpu())
    maps: dict[str, MergeMap] = {}
    for space in spec.by_depth:
        size = (sizes or {}).get(space.name, space.size)
        if space.name in wanted and size != space.size and (spec.children(space.name) or space.name not in moments):
            maps[space.name] = match_blocks(spec, space, moments, n_models, size, method)
        elif space.name in wanted:
            maps[space.name] = match_space(spec, space, own, similar, maps, method, n_models, options, size)
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
    maps: Mapping[str, MergeMap], method: str, n_models: int, options: Mapping[str, Any], size: int | None = None,
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
        size: How many merged channels there are to be, in a space that lies in no blocks and has none; None: n.
    """
    within = list(spec.inside(space.name))
    if not space.linear or within or space.parent is not None:
        method = elsewhere(method) or method
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
        return match(method, similarity, n_models=n_models, size=size, **options)
    return _match_in_blocks(similarity, maps[space.parent], method, n_models, options)


def _match_in_blocks(
    similarity: Tensor, parent: MergeMap, method: str, n_models: int, options: Mapping[str, Any]
) -> MergeMap:
    """Match channels inside each set of blocks that the parent's map puts together."""
    blocks = parent.size
    width = len(similarity) // (n_models * parent.width)
    found: list[tuple[Tensor, MergeMap]] = []
    for block in range(blocks):
        members = parent.members(block)
        here = (members[:, None] * width + torch.arange(width)).reshape(-1)
        found.append((here, match(method, similarity[here][:, here], n_models=len(members), **options)))
    whole = sum(len(here) for here, _ in found) == len(similarity)  # no block is left out
    if whole and all(inner.sparse is not None for _, inner in found):
        target = torch.empty(len(similarity), dtype=torch.int64)
        weight = torch.empty(len(similarity), dtype=torch.float64)
        for block, (here, inner) in enumerate(found):
            assert inner.sparse is not None
            target[here], weight[here] = block * width + inner.sparse[0], inner.sparse[1]
        return MergeMap(n_models, (target, weight), n_out=blocks * width)
    merge = torch.zeros(blocks * width, len(similarity), dtype=torch.float64)
    unmerge = torch.zeros(len(similarity), blocks * width, dtype=torch.float64)
    for block, (here, inner) in enumerate(found):
        there = torch.arange(block * width, (block + 1) * width)
        merge[there[:, None], here] = inner.merge
        unmerge[here[:, None], there] = inner.unmerge
    return MergeMap.from_matrices(merge, unmerge, n_models)
