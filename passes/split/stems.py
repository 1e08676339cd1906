"""Stems: each model's own first layers, side by side in front of the trunk.

What merging loses it mostly loses early, where one network's width computes what two did. Up to ``start`` each model
keeps its own layers; what crosses there is merged as the spaces say, x = M [z_1; ...; z_N], and the trunk goes on from
values without errors. The place is one where heads could begin (`fxzip.passes.cut`): there every tensor's channels lie
along one axis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxzip.data.loops import device_of
from fxzip.graphs import free_name
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.split.along import along_axes

STEM = "stem"
"""Key in the meta of unmerged nodes: the number of their stem's model, or `JOINED`. Their names start with it."""
JOINED = -1
"""In the place of a model's number: nodes that join the stems."""


@dataclass(eq=False)
class Stems:
    """The stems of all models in a graph that is being built.

    Attributes:
        plan: What is merged; the stems are the nodes before its beginning.
        joins: The matrices that join them, by the names of the trunk's buffers.
    """

    plan: MergePlan
    joins: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """The modules of the trunk that hold what is each stem's; none without stems."""
        taken = dir(self._modules[0])
        return tuple(free_name(f"{STEM}{model}", taken) for model in self.plan.models if self.plan.begin)

    @property
    def _modules(self) -> tuple[fx.GraphModule, ...]:
        return self.plan.alignment.modules

    def insert(self, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
        """Append the stems, and what joins them.

        Args:
            graph: The trunk's.
            copies: The trunk's nodes by the first model's; the placeholders are there, what crosses is added.
        """
        inputs = [copies.get(self.plan.trunk_node(i)) for i in range(self.plan.begin)]
        stems = [self._stem(graph, model, inputs) for model in self.plan.models]
        for i in self.plan.entering:
            node = self.plan.trunk_node(i)
            if node not in copies:
                copies[node] = self._join(graph, node, [stem[i] for stem in stems])

    def root(self) -> fx.GraphModule:
        """A module where the nodes that were inserted, and those of the first model, find what they name."""
        if not self.plan.begin:
            return self.plan.trunk
        root = copy.copy(self.plan.trunk)
        for prefix, module in zip(self.prefixes, self._modules, strict=True):
            root.add_module(prefix, module)
        for name, matrix in self.joins.items():
            root.register_buffer(name, matrix)
        return root

    def _stem(self, graph: fx.Graph, model: int, inputs: Sequence[fx.Node | None]) -> dict[int, fx.Node]:
        """One model's nodes, by their places."""
        module, places = self._modules[model], self.plan.places(model)
        mine = [n for n in module.graph.nodes if places.get(n.name, self.plan.begin) < self.plan.begin]
        found: dict[fx.Node, fx.Node] = {}
        for node in mine:
            given = inputs[places[node.name]] if node.op == "placeholder" else None
            found[node] = self._copied(graph, node, model, found) if given is None else given
        return {places[node.name]: new for node, new in found.items()}

    def _copied(self, graph: fx.Graph, node: fx.Node, model: int, found: Mapping[fx.Node, fx.Node]) -> fx.Node:
        target: Any = node.target
        if node.op in ("call_module", "get_attr"):
            target = f"{self.prefixes[model]}.{node.target}"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        new = graph.create_node(node.op, target, args, kwargs, name=self._free_node(f"{STEM}{model}_{node.name}"))
        new.meta = {**node.meta, STEM: model}
        return new

    def _free_node(self, wanted: str) -> str:
        """A name that no node of the models has: a node of the trunk that has one is known as theirs."""
        return free_name(wanted, {name for nodes in self.plan.alignment.nodes for name in nodes})

    def _join(self, graph: fx.Graph, node: fx.Node, values: Sequence[fx.Node]) -> fx.Node:
        """M [z_1; ...; z_N] under the name of the first model's node; the mean where there are no channels."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return values[0]  # a size, or what is computed from sizes
        count = len(values)
        spec, maps, trunk = self.plan.spec, self.plan.maps, self.plan.trunk_spec
        parts = [along_axes(spec, maps, node.name, k, "produce", 1 / count, trunk) for k in range(count)]
        if not parts[0]:
            total = values[0]
            for other in values[1:]:
                total = self._joined(graph, node, torch.add, total, other)
            return self._joined(graph, node, torch.mul, total, 1 / count, last=True)
        (axis,) = parts[0]
        matrix = torch.cat([part[axis] for part in parts], 1)
        name = free_name(f"join_{node.name}", dir(self._modules[0]))
        self.joins[name] = matrix.to(device_of(self._modules[0]), value.dtype)
        behind = axis == value.dim() - 1
        moved = [z if behind else self._joined(graph, node, torch.movedim, z, axis, -1) for z in values]
        stacked = self._joined(graph, node, torch.cat, moved, -1)
        how = graph.create_node("get_attr", name, name=self._free_node(name))
        mixed = self._joined(graph, node, F.linear, stacked, how, last=behind)
        if behind:
            return mixed
        laid = self._joined(graph, node, torch.movedim, mixed, -1, axis)  # a view may follow, which wants rows in order
        return self._joined(graph, node, "contiguous", laid, last=True)

    def _joined(self, graph: fx.Graph, node: fx.Node, function: Any, *args: Any, last: bool = False) -> fx.Node:
        """A step of a join, a function or a method by its name; the last has the name of the first model's node."""
        called = function if isinstance(function, str) else function.__name__
        name = node.name if last else self._free_node(f"join_{node.name}_{called}")
        new = graph.create_node("call_method" if called is function else "call_function", function, args, name=name)
        new.meta = {STEM: JOINED} | ({"val": node.meta["val"]} if last else {})
        return new
