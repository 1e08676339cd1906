"""`MergePlan`: what is merged, and how: the one value that splitting, refitting, costs and reports read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import fx

from fxzip.channels import ChannelSpec
from fxzip.graphs import nodes_by_name
from fxzip.matching import MergeMap
from fxzip.passes.align import Alignment
from fxzip.passes.cut.cut import crossing

if TYPE_CHECKING:
    from fxzip.passes.resize import Resized


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A merge of aligned models between two places of their shared nodes.

    A place is a number of shared nodes: those before it have a number below it.

    Attributes:
        alignment: The traced models.
        spec: The channel spaces of the first one.
        maps: The maps of the spaces that are merged.
        begin: The place where merging begins; what comes before it each model keeps as its stem.
        end: The place of the cut, where the trunk ends and the heads begin.
        resized: The first model's graph with the numbers of channels that the trunk is to have; None where they are
            the models' own.
    """

    alignment: Alignment
    spec: ChannelSpec
    maps: Mapping[str, MergeMap]
    begin: int
    end: int
    resized: Resized | None = None

    @property
    def trunk(self) -> fx.GraphModule:
        """The network whose nodes and sizes the trunk has."""
        return self.alignment.modules[0] if self.resized is None else self.resized.module

    @property
    def trunk_spec(self) -> ChannelSpec:
        """Where the merged channels lie in it."""
        return self.spec if self.resized is None else self.resized.spec

    @cached_property
    def _trunk_nodes(self) -> dict[str, fx.Node]:
        return nodes_by_name(self.trunk)

    def trunk_node(self, i: int) -> fx.Node:
        """The i-th shared node in the network that the trunk is made of."""
        return self._trunk_nodes[self.name(i)]

    @property
    def models(self) -> range:
        """The numbers of the models."""
        return range(len(self.alignment.modules))

    @cached_property
    def crossing(self) -> tuple[int, ...]:
        """The numbers of the shared nodes that the heads take from the trunk."""
        return crossing(self.alignment, self.end)

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """The numbers of the shared nodes that are joined where merging begins; none at the input."""
        return crossing(self.alignment, self.begin) if self.begin else ()

    @cached_property
    def peers(self) -> dict[str, tuple[str, ...]]:
        """For each parameter and buffer of the first model's nodes in the trunk its name in every model."""
        return self.alignment.peers(self.end)

    @cached_property
    def _places(self) -> tuple[dict[str, int], ...]:
        shared = self.alignment.shared[: self.end]
        return tuple({names[model]: i for i, names in enumerate(shared)} for model in self.models)

    def places(self, model: int) -> Mapping[str, int]:
        """The numbers of the shared nodes before the cut, by their names in one model."""
        return self._places[model]

    def learned(self, model: int) -> frozenset[str]:
        """The nodes of one model that depend on no input: trunk and heads have each their own."""
        return self.alignment.learned[model]

    def name(self, i: int, model: int = 0) -> str:
        """The name of the i-th shared node in one model."""
        return self.alignment.shared[i][model]

    def node(self, i: int, model: int = 0) -> fx.Node:
        """The i-th shared node in one model."""
        return self.alignment.nodes[model][self.name(i, model)]
