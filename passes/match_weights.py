"""Match by weights: Git Re-Basin's weight matching, and dual-space matching of weights and activations.

Channels of two models are alike by their weights where the parameters that produce and that contract them are:

    S = Σ over the space's sites  W_1 · (P W_k)ᵀ

with the permutations P of all other spaces applied to model k. S depends on the other spaces' permutations, so
spaces are solved one at a time, in a random order, until none changes (coordinate descent; Ainsworth et al.,
arXiv 2209.04836, section 3.2 and algorithm 1). No data is needed. Dual-space matching (Xu et al., arXiv
2403.01753) solves the same with a blend of S and the correlations of the activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec, Site
from fxzip.matching import MergeMap
from fxzip.passes.match import match_space
from fxzip.passes.split.fuse import Place, places_by_parameter, transformed

States = Sequence[Mapping[str, Tensor]]
Maps = dict[str, MergeMap]


def match_by_weights(
    spec: ChannelSpec,
    states: States,
    names: Collection[str],
    correlations: Mapping[str, Tensor] | None = None,
    gamma: float = 0.0,
    sweeps: int = 30,
    seed: int = 0,
) -> Maps:
    """The merge map of each of the named spaces, every model permuted onto the first.

    All spaces are matched, named or not: a space is only found by what lies behind it if that is in order.

    Args:
        spec: The channel spaces.
        states: The parameters of each model, under the first one's names; those that they do not share are left out.
        names: The spaces whose maps are wanted; those of their parents are given too.
        correlations: For ``gamma > 0``: of the activations, (Σn, Σn) by space.
        gamma: Share of the activations in the blend, 0 (weights alone) to 1.
        sweeps: Most rounds over all spaces.
        seed: Of the order of the spaces in each round.
    """
    families = [[space, *_below(spec, space)] for space in spec.by_depth if not space.parent]
    count = len(states)
    maps = {
        space.name: MergeMap.from_assignment(torch.arange(space.size).repeat(count), count)
        for family in families
        for space in family
    }
    generator = torch.Generator().manual_seed(seed)
    for _ in range(sweeps):
        before = dict(maps)
        for number in torch.randperm(len(families), generator=generator).tolist():
            maps |= _rematched(spec, families[number], states, maps, correlations or {}, gamma)
        if all(torch.equal(before[name].assignment, maps[name].assignment) for name in maps):
            break
    wanted = spec.with_parents(names)
    return {name: found for name, found in maps.items() if name in wanted}


def _below(spec: ChannelSpec, root: ChannelSpace) -> list[ChannelSpace]:
    """The spaces that lie in a space's blocks, from the outside in: their maps depend on one another."""
    below = {space.name for space in spec.inside(root.name)}
    return [space for space in spec.by_depth if space.name in below]


def _rematched(
    spec: ChannelSpec, family: Sequence[ChannelSpace], states: States, maps: Maps,
    correlations: Mapping[str, Tensor], gamma: float,
) -> Maps:  # fmt: skip
    others = {name: found for name, found in maps.items() if all(space.name != name for space in family)}
    similar = {space.name: weight_similarity(spec, space, states, others, cosine=gamma > 0) for space in family}
    for name in similar.keys() & correlations.keys():
        similar[name] = (1 - gamma) * similar[name] + gamma * correlations[name]
    fresh: Maps = {}
    for space in family:
        fresh[space.name] = match_space(spec, space, similar, similar, fresh, "permute", len(states), {})
    return fresh


def weight_similarity(
    spec: ChannelSpec, space: ChannelSpace, states: States, maps: Mapping[str, MergeMap], cosine: bool = False
) -> Tensor:
    """S of one space between the first model and each other, (Σn, Σn), 0 within a model and between the others.

    Sites inside the groups of a grouped convolution are left out: which rows they lie in is the map's to say.

    Args:
        spec: The channel spaces.
        space: The one that is matched.
        states: The parameters of each model, under the first one's names.
        maps: The maps of the other spaces.
        cosine: Divide by the lengths of the channels' weights: a value of -1 to 1, as a correlation is.
    """
    peers = places_by_parameter(spec, maps)
    size, count = space.size, len(states)
    similarity = torch.zeros(count * size, count * size, dtype=torch.float64)
    power = torch.full((count, size), 1e-30, dtype=torch.float64)
    for site in space.sites:
        shared = all(site.parameter in state for state in states)
        if site.rows is not None or not shared or site.statistic is not None:
            continue
        rows = [
            _rows(site, _carried(states[k][site.parameter], peers.get(site.parameter, []), k)) for k in range(count)
        ]
        for k, own in enumerate(rows):
            power[k] += own.square().sum(1).cpu()
            if k:
                similarity[:size, k * size : (k + 1) * size] += (rows[0] @ own.T).double().cpu()
    if cosine:
        length = power.sqrt().reshape(-1)
        similarity /= length[:, None] * length[None, :]
    return similarity + similarity.T


def _carried(tensor: Tensor, places: Sequence[Place], model: int) -> Tensor:
    """A model's parameter in the first one's order on the axes of other spaces."""
    work = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    # U takes a permuted model's channels to their places without M's share of 1/N.
    return transformed(work, [replace(place, role="contract") for place in places], model)


def _rows(site: Site, tensor: Tensor) -> Tensor:
    """The weights of each channel at a site, (channels, copies and what else)."""
    channels = site.index.to(tensor.device)
    return tensor.movedim(site.axis, 0)[channels].reshape(len(channels), -1)
