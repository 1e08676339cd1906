"""What units should give: the parents' values under the merge maps, one-sided where ReLUs follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxzip.graphs import is_relu
from fxzip.passes.refit.lockstep import Batch, LockStep
from fxzip.passes.refit.units import Unit

Target = Callable[[str, Sequence[Tensor]], Tensor]
"""What a node of the merged network should give, from the parents' values."""


class Goals:
    """The targets of units, and how far values are from them.

    Attributes:
        lock: The lock step; the merged network is its last.
        target: What a node should give, from the parents' values.
    """

    def __init__(self, lock: LockStep, target: Target) -> None:
        self.lock, self.target = lock, target
        self._known: dict[Batch, Tensor] = {}
        self._before: dict[Batch, Tensor] = {}

    def forget(self) -> None:
        """Forget the targets of one unit: another's are next."""
        self._known.clear()
        self.forget_linear()

    def forget_linear(self) -> None:
        """Forget what `linear` alone needs: all that follows is one-sided."""
        self._before.clear()

    def residual(self, batch: Batch, unit: Unit, has: Tensor) -> Tensor:
        """The residual of a unit's value; 0 where a ReLU makes 0 of it, as it should."""
        wanted = self.wanted(batch, unit)
        if not self.one_sided(unit):
            return wanted - has
        # The product is 0 where a ReLU should give 0, and immense elsewhere; torch.where takes ten times as long.
        return torch.minimum(wanted - has, wanted * torch.finfo(wanted.dtype).max)

    def linear(self, batch: Batch, unit: Unit, has: Tensor) -> Tensor:
        """The residual, by the parents' values before the ReLU where ReLUs give 0."""
        return self._wanted_before(batch, unit) - has

    def _wanted_before(self, batch: Batch, unit: Unit) -> Tensor:
        wanted = self.wanted(batch, unit)
        if not self.one_sided(unit):
            return wanted
        if batch not in self._before:
            below = self.target(unit.root.name, [env[unit.root.name] for env in batch.env[:-1]])
            self._before[batch] = below.clamp(max=0) * (wanted == 0) + wanted
        return self._before[batch]

    def wanted(self, batch: Batch, unit: Unit) -> Tensor:
        """What a unit should give, or the ReLU behind it."""
        if batch not in self._known:
            values = [env[unit.root.name] for env in batch.env[:-1]]
            if self.one_sided(unit):
                self._known[batch] = self.target(unit.root.name, [value.relu() for value in values]).relu()
            else:
                self._known[batch] = self.target(unit.root.name, values)
        return self._known[batch]

    def one_sided(self, unit: Unit) -> bool:
        """Whether a unit's value goes through nothing but ReLUs."""
        users = unit.root.users
        return bool(users) and all(is_relu(self.lock.streams[-1].module, user) for user in users)
