"""What a merged network should give at a node: M [z_1; ...; z_N], from the parents' values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxzip.channels import ChannelSpec
from fxzip.matching import MergeMap
from fxzip.passes.split.fuse import Mixing

_Place = tuple[MergeMap, tuple[int, ...], Tensor]  # a map, the axes where its channels lie, their index along them


class Targets:
    """What a merged network should give, by node: the sum over the models of M_p z_p.

    Channels that lie in no space are averaged.
    """

    def __init__(self, spec: ChannelSpec, maps: Mapping[str, MergeMap]) -> None:
        self._spec, self._maps = spec, maps
        self._places: dict[str, list[_Place]] = {}

    def __call__(self, node: str, values: Sequence[Tensor]) -> Tensor:
        """The target at a node, from the parents' values there."""
        places = [(merge_map, axes, index.to(values[0].device)) for merge_map, axes, index in self._located(node)]
        total: Tensor | None = None
        for model, value in enumerate(values):
            part = _mapped(value, places, model)
            total = part if total is None else total + part
        assert total is not None
        weights = _weights(total, places, len(values))
        return total if weights is None else total * weights

    def _located(self, node: str) -> list[_Place]:
        if node not in self._places:
            where = self._spec.locate(node)
            self._places[node] = [
                (self._maps[s.name], axes, i) for s, axes, i in where if s.name in self._maps and axes
            ]
        return self._places[node]


def _mapped(value: Tensor, places: Sequence[_Place], model: int) -> Tensor:
    """One model's value with M_p along all axes that have channels (tokens and channels of a Mixer, say)."""
    for merge_map, axes, index in places:
        front = tuple(range(len(axes)))
        moved = value.movedim(axes, front)
        flat, here = moved.flatten(0, len(axes) - 1), index.reshape(-1)
        whole = _is_whole(here, len(flat))
        rows = (flat if whole else flat[here]).unflatten(0, tuple(index.shape))
        mixing = Mixing.of(merge_map, model, "produce")
        mixed = mixing(rows if mixing.target is not None else rows.flatten(1)).reshape(len(here), *flat.shape[1:])
        flat = mixed if whole else flat.index_copy(0, here, mixed)
        value = flat.unflatten(0, moved.shape[: len(axes)]).movedim(front, axes)
    return value


def _weights(total: Tensor, places: Sequence[_Place], n_models: int) -> Tensor | None:
    """What the sum is multiplied by: 1 where M has weighted it, 1/N where it has not; None for 1 everywhere.

    Where M acts on several axes the weights are counted, as for parameters (`fxzip.passes.split.fuse`).
    """
    touched = {axis for _, axes, _ in places for axis in axes}
    shape = [size if axis in touched else 1 for axis, size in enumerate(total.shape)]
    if len(places) == 1:
        _, axes, index = places[0]
        here, size = index.reshape(-1), math.prod(total.shape[axis] for axis in axes)
        if _is_whole(here, size):
            return None
        weights = total.new_full((size,), 1 / n_models).index_fill(0, here, 1.0)
        sizes = [total.shape[axis] for axis in axes]
        return weights.reshape(sizes + [1] * (total.dim() - len(axes))).movedim(tuple(range(len(axes))), axes)
    count = total.new_zeros(shape)
    for model in range(n_models):
        count += _mapped(torch.ones_like(count), places, model)
    return torch.where(count > 0, 1 / count, 0.0)


def _is_whole(index: Tensor, size: int) -> bool:
    return len(index) == size and torch.equal(index, torch.arange(size, device=index.device))
