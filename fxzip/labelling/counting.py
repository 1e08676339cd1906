"""Which channel spaces cannot change their number of channels: an operation sums over them, and without weights.

A layer's weights say how much of each channel goes into a sum, so that any number of channels can give the same one. A
mean, a norm or a softmax over channels depends on how many there are. Inside blocks that are kept or left out as wholes
(the channels of an attention head) that does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxzip.channels import ChannelSpace, Layout
from fxzip.labelling.labels import LabelGraph


def with_reasons(graph: LabelGraph, spaces: Sequence[ChannelSpace], layout: Layout) -> tuple[ChannelSpace, ...]:
    """The spaces, those that must keep their number of channels with the reason.

    Args:
        graph: The labels of the network.
        spaces: Its channel spaces.
        layout: Which channel each label is.
    """
    of_root, unit = _roots(spaces)
    offset = torch.tensor([0, *(space.size for space in spaces)]).cumsum(0)
    unit_of = torch.cat([*unit, torch.zeros(0, dtype=torch.int64)])
    reasons: dict[int, str] = {}
    for node, labels, axes in graph.summed:
        owner = layout.space[labels]
        if not bool((owner >= 0).any()):
            continue
        units = torch.where(
            owner >= 0, unit_of[(offset[owner.clamp(min=0)] + layout.channel[labels]) % len(unit_of)], -1
        )
        for number in owner[owner >= 0].unique().tolist():
            mine = torch.where(owner == number, units, -1)
            least = torch.where(owner == number, units, mine.max())
            if bool((mine.amax(axes) > least.amin(axes)).any()):
                reasons.setdefault(of_root[number], f"{node} sums over its channels without weights")
    return tuple(replace(space, fixed=reasons.get(of_root[number])) for number, space in enumerate(spaces))


def _roots(spaces: Sequence[ChannelSpace]) -> tuple[list[int], list[Tensor]]:
    """For each space the number of its root, and for each of its channels the root's channel."""
    number = {space.name: k for k, space in enumerate(spaces)}
    roots, units = [], []
    for k, space in enumerate(spaces):
        unit = torch.arange(space.size)
        while space.parent is not None and space.block is not None:
            unit, k = space.block[unit], number[space.parent]
            space = spaces[k]
        roots.append(k)
        units.append(unit)
    return roots, units
