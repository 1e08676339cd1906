"""Sizes follow labels: how long an axis is, or a part of it, where its channel spaces have other numbers of channels.

A space and those that lie in its blocks are a family, of as many blocks as its root has channels. Blocks are added and
left out as wholes, so a family of n blocks that gets n' has n' / n times as many channels in each of its spaces. Along
an axis, or a part of it, there lie all blocks of a family, each equally often, or positions inside of one block only;
the former are n' / n times as many, the latter are as many as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from fxzip.channels import ChannelSpace, ChannelSpec, Site
from fxzip.rules.sizing import SizeError


class Sizes:
    """New sizes of a network's tensors.

    Attributes:
        spec: The channel spaces as they are.
        blocks: The new number of blocks of each family that changes, by its root.
    """

    def __init__(self, spec: ChannelSpec, blocks: Mapping[str, int]) -> None:
        self.spec, self.blocks = spec, dict(blocks)

    @cached_property
    def ratios(self) -> dict[str, Fraction]:
        """By how much each space that changes grows."""
        roots = {space.name: self.spec.root(space.name) for space in self.spec.spaces}
        return {
            name: Fraction(self.blocks[root.name], root.size)
            for name, root in roots.items()
            if root.name in self.blocks
        }

    def of_space(self, space: ChannelSpace) -> int:
        """The new number of channels of a space."""
        return int(space.size * self.ratios.get(space.name, Fraction(1)))

    def of_parameter(self, shape: torch.Size, sites: list[tuple[ChannelSpace, Site]]) -> list[int]:
        """The new shape of a parameter from the sites on it; inside groups it is as it was."""
        found = list(shape)
        for space, site in sites:
            if site.rows is None:
                more = site.index.numel() * (self.ratios.get(space.name, Fraction(1)) - 1)
                found[site.axis] += int(more)
        return found

    def of_part(self, node: str, axis: int, size: int, start: int, stop: int) -> int:
        """How many positions there are in the place of ``start`` to ``stop`` on an axis of a node's value.

        Args:
            node: The node.
            axis: The axis.
            size: Its size as it was.
            start: The first position.
            stop: Behind the last one.

        Raises:
            SizeError: Channels lie there that are no whole part of their space.
        """
        ratio = Fraction(1)
        for factor in self.spec.layout.factors.get(node, ()):
            if factor.shape[axis] > 1 and stop > start:
                line = factor.movedim(axis, 0).reshape(size, -1)[start:stop, 0]
                ratio *= Fraction(self._counted(line), len(line))
        found = (stop - start) * ratio
        if found.denominator != 1:
            raise SizeError("channels of several spaces share its positions")
        return int(found)

    def change(self, node: str, axis: int) -> bool:
        """Whether blocks lie along an axis of a node's value of which there are to be more or fewer."""
        for factor in self.spec.layout.factors.get(node, ()):
            line = factor.movedim(axis, 0).reshape(factor.shape[axis], -1)[:, 0]
            owner, channel = self.spec.layout.space[line], self.spec.layout.channel[line]
            for number in owner[owner >= 0].unique().tolist():
                name = self.spec.spaces[number].name
                if name in self.ratios and len(self.spec.units[name][channel[owner == number]].unique()) > 1:
                    return True
        return False

    def _counted(self, labels: Tensor) -> Fraction:
        """How many positions there are in the place of these labels."""
        owner, channel = self.spec.layout.space[labels], self.spec.layout.channel[labels]
        total = Fraction(int((owner < 0).sum()))
        for number in owner[owner >= 0].unique().tolist():
            space = self.spec.spaces[number]
            unit = self.spec.units[space.name][channel[owner == number]]
            total += len(unit) * self._growth(space, unit)
        return total

    def _growth(self, space: ChannelSpace, unit: Tensor) -> Fraction:
        """By how much positions grow that lie in these blocks of a space's family."""
        if space.name not in self.ratios:
            return Fraction(1)
        root = self.spec.root(space.name)
        times = unit.bincount(minlength=root.size)
        if bool((times == times[0]).all()):
            return self.ratios[space.name]
        if int((times > 0).sum()) == 1:
            return Fraction(1)
        raise SizeError(f"a part of the channels of {space.name} lies there")
