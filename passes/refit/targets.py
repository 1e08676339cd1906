"""What a merged network should give at a node: M [z_1; ...; z_N], from the parents' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fxzip.channels import Located
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.split.fuse import Place, merged
from fxzip.passes.split.laid import Laid, laid_in


class Targets:
    """What a merged network should give, by node: the sum over the models of M_p z_p.

    Channels that lie in no space are averaged.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._places: dict[str, list[Place]] = {}

    def __call__(self, node: str, values: Sequence[Tensor]) -> Tensor:
        """The target at a node, from the parents' values there."""
        if node not in self._places:
            self._places[node] = [
                Place(self._plan.maps[space.name], axes, index, into=self._laid(node, (space, axes, index)))
                for space, axes, index in self._plan.spec.locate(node)
                if space.name in self._plan.maps and axes
            ]
        device = values[0].device
        return merged(values, [replace(place, index=place.index.to(device)) for place in self._places[node]])

    def _laid(self, node: str, located: Located) -> Laid | None:
        """Where the merged channels come to lie; None where the models' do."""
        return None if self._plan.resized is None else laid_in(self._plan.trunk_spec, node, located)
