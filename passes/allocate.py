"""Allocate: how many channels each space gets of a budget, by what is left unexplained for what it costs.

What a space's first k pivots (`fxzip.matching.selection`) leave unexplained of its variance is its curve. What the
trunk costs is a product of numbers of channels for each layer. From few channels everywhere, the space gets more next
whose curve falls most for the operations that it adds (a greedy knapsack, as PLeaS, arXiv 2407.02447, solves one by an
integer program), so that in the end the last channels of each leave alike much unexplained for what they cost. Spaces
stay within a factor of the width that would be the same for all: a curve says what is lost there, not what is lost by
that at the end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.graphs import attribute, linear_of
from fxzip.matching.selection import equalised, pivoted
from fxzip.matching.similarity import Floats
from fxzip.moments import Moments

LEAST, MOST = 0.9, 1.15
"""How narrow and how wide a space may become, as a share of the width that would be the same for all. Wider limits
of 0.5 and 1.6 kept a point of accuracy less of one pair of ResNet-20 on CIFAR: a curve says little of what is lost by
the end."""
STEPS = 32
"""A space grows by one of so many parts of a network's channels at a time."""
MULTIPLE, FROM = 8, 64
"""From 64 channels on their number is a multiple of 8, which kernels like."""


@dataclass(frozen=True)
class Term:
    """What a layer costs: as much as it did, times by how much each of its axes grows.

    Attributes:
        factor: What it did cost.
        axes: For each axis the share of it that does not change, and that of each block of a family.
    """

    factor: float
    axes: tuple[tuple[float, Mapping[str, float]], ...]

    def __call__(self, blocks: Mapping[str, int]) -> float:
        """The cost with so many blocks in each family."""
        found = self.factor
        for rest, each in self.axes:
            found *= rest + sum(share * blocks[root] for root, share in each.items())
        return found


@dataclass(eq=False)
class Costs:
    """What a trunk costs, by the numbers of blocks of its families.

    Attributes:
        terms: Of the layers.
        rest: What does not depend on them: the heads.
        one: What one network costs.
    """

    terms: list[Term]
    rest: float
    one: float
    _of: dict[str, list[Term]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for term in self.terms:
            for root in {root for _, each in term.axes for root in each}:
                self._of.setdefault(root, []).append(term)

    def __call__(self, blocks: Mapping[str, int]) -> float:
        """The cost of all, in networks."""
        return (self.rest + sum(term(blocks) for term in self.terms)) / self.one

    def more(self, blocks: Mapping[str, int], root: str, count: int) -> float:
        """What it costs more if a family gets another number of blocks, in networks."""
        changed = {**blocks, root: count}
        return sum(term(changed) - term(blocks) for term in self._of.get(root, ())) / self.one


def flops_terms(
    module: fx.GraphModule, spec: ChannelSpec, free: Collection[str], flops: Mapping[str, int], nodes: Collection[str]
) -> list[Term]:
    """The terms of floating-point operations: of a layer by its weight, of other operations by their result.

    Args:
        module: A network.
        spec: Its channel spaces.
        free: The families that can change.
        flops: What each node does for one example.
        nodes: The nodes that are merged.
    """
    found = []
    for node in module.graph.nodes:
        if node.name in nodes and flops.get(node.name, 0):
            linear = linear_of(module, node)
            if linear is None:
                axes = _of_result(spec, free, node.name)
            else:
                axes = _of_parameter(module, spec, free, linear.weight)
            found.append(Term(flops[node.name], axes))
    return found


def parameter_terms(
    module: fx.GraphModule, spec: ChannelSpec, free: Collection[str], names: Collection[str]
) -> list[Term]:
    """The terms of the named parameters of a network: how many elements they have."""
    found = []
    for name in names:
        tensor = attribute(module, name)
        if isinstance(tensor, torch.nn.Parameter):
            found.append(Term(tensor.numel(), _of_parameter(module, spec, free, name)))
    return found


Axes = tuple[tuple[float, Mapping[str, float]], ...]


def _of_parameter(module: fx.GraphModule, spec: ChannelSpec, free: Collection[str], name: str) -> Axes:
    """As of a `Term`: the shares of a parameter's axes."""
    shape = attribute(module, name).shape
    lying: list[dict[str, float]] = [{} for _ in shape]
    for space in spec.spaces:
        for site in space.sites:
            each, root = lying[site.axis] if site.parameter == name else {}, spec.root(space.name).name
            if site.parameter == name and site.rows is None and root in free:
                each[root] = each.get(root, 0.0) + site.index.numel()
    return tuple(_shares(spec, size, each) for size, each in zip(shape, lying, strict=True) if each)


def _of_result(spec: ChannelSpec, free: Collection[str], node: str) -> Axes:
    """As of a `Term`: the shares of the axes of a node's output, those of a space together."""
    found = []
    for space, along, index in spec.locate(node):
        size = math.prod(max(f.shape[a] for f in spec.layout.factors[node]) for a in along)
        if spec.root(space.name).name in free:
            found.append(_shares(spec, size, {spec.root(space.name).name: index.numel()}))
    return tuple(found)


def _shares(spec: ChannelSpec, size: int, lying: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
    """The share of an axis that does not change, and that of each block of the families that lie there."""
    return 1 - sum(lying.values()) / size, {root: count / size / spec[root].size for root, count in lying.items()}


def curve(spec: ChannelSpec, space: ChannelSpace, moments: Mapping[str, Moments], n_models: int) -> Floats:
    """What is left unexplained of a family's variance by one channel (or block) more each, as a share; (N · n + 1,).

    Of blocks it is what those carry that are left out.

    Args:
        spec: The channel spaces.
        space: The root of the family.
        moments: What was observed, by space.
        n_models: Number of models N.
    """
    total = n_models * space.size
    inside = [below for below in spec.inside(space.name) if below.name in moments]
    if not inside and space.name in moments:
        covariance = equalised(moments[space.name].covariance.cpu().numpy(), n_models)
        found, left = pivoted(covariance, total)
        whole = np.zeros(total + 1)
        whole[0], whole[1 : len(found) + 1] = covariance.trace(), left
        shares: Floats = whole / max(whole[0], 1e-300)
        return shares
    power = np.zeros(total)
    for below in inside:
        variance = moments[below.name].covariance.diagonal().cpu().numpy().reshape(total, -1).sum(1)
        power += variance / max(variance.sum(), 1e-300)
    if not inside:
        return np.linspace(1, 0, total + 1)
    ordered = np.sort(power)[::-1].cumsum()
    return np.concatenate([[1.0], 1 - ordered / max(ordered[-1], 1e-300)])


def rounded(size: float, most: int) -> int:
    """A number of channels near a size: 2 at the least, a multiple of 8 where it is large."""
    near = MULTIPLE * round(size / MULTIPLE) if size >= FROM else round(size)
    return max(min(near, most), 2)


def same_width(roots: Sequence[ChannelSpace], width: float, n_models: int) -> dict[str, int]:
    """As many blocks for each family as one width gives."""
    return {root.name: rounded(width * root.size, n_models * root.size) for root in roots}


def allocate(
    roots: Sequence[ChannelSpace], curves: Mapping[str, Floats], cost: Costs, budget: float, n_models: int
) -> dict[str, int]:
    """As many blocks for each family as a budget allows.

    Args:
        roots: The families.
        curves: What is left unexplained, by the number of blocks.
        cost: Of the trunk.
        budget: In networks; the least that there can be where it is lower.
        n_models: Number of models N.
    """
    width = widest(lambda w: cost(same_width(roots, w, n_models)) <= budget, n_models)
    sizes = {root.name: root.size for root in roots}
    blocks = same_width(roots, LEAST * width, n_models)
    most = same_width(roots, MOST * width, n_models)
    spent = cost(blocks)

    def wider(name: str) -> int:
        count = rounded(blocks[name] + max(sizes[name] / STEPS, 1), most[name])
        return min(max(count, blocks[name] + (MULTIPLE if count >= FROM else 1)), most[name])

    def price(name: str) -> tuple[float, str]:
        gain = curves[name][blocks[name]] - curves[name][wider(name)]
        return -gain / max(cost.more(blocks, name, wider(name)), 1e-12), name

    heap = [price(name) for name in blocks if blocks[name] < most[name]]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        fresh = price(name)
        if heap and fresh > heap[0]:  # others have grown since, and so has its price
            heapq.heappush(heap, fresh)
            continue
        more = cost.more(blocks, name, wider(name))
        if spent + more <= budget:
            blocks[name], spent = wider(name), spent + more
            if blocks[name] < most[name]:
                heapq.heappush(heap, price(name))
    return blocks


def widest(fits: Callable[[float], bool], n_models: int) -> float:
    """The greatest width that fits, 0 to N, to a thousandth."""
    low, high = 0.0, float(n_models)
    if fits(high):
        return high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
