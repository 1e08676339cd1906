"""The network that is polished: trunk and heads run as one, what its layers take and give watched on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.contraction import Contraction
from fxzip.data.batches import Given
from fxzip.graphs import bind_inputs, linear_of, named_call, parameter_uses
from fxzip.passes.compare import leaves
from fxzip.passes.polish.goal import Outputs
from fxzip.passes.split.stems import STEM


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight nothing else uses.

    Attributes:
        node: Its node.
        source: Where its input comes from.
        weight: The weight.
        bias: The bias; None where it has none of its own.
        contraction: How weight and input are multiplied.
    """

    node: fx.Node
    source: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    contraction: Contraction

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def packed(self, values: Sequence[Tensor]) -> Tensor:
        """A value for each of ``parameters`` as one matrix (groups, o, d), the bias as the last of the d columns."""
        matrix = self.contraction.packed(values[0])
        if self.bias is None:
            return matrix
        return torch.cat([matrix, values[1].reshape(*matrix.shape[:2], 1)], 2)

    def unpacked(self, matrix: Tensor) -> list[Tensor]:
        """What `packed` gives a matrix of."""
        if self.bias is None:
            return [self.contraction.unpacked(matrix)]
        return [self.contraction.unpacked(matrix[:, :, :-1].contiguous()), matrix[:, :, -1].reshape(self.bias.shape)]

    def columns(self, x: Tensor, here: Tensor | None) -> Tensor:
        """The inputs (groups, d, samples), 1 for the bias, as of `Contraction.columns`."""
        found = self.contraction.columns(x, here)
        return found if self.bias is None else torch.cat([found, torch.ones_like(found[:, :1])], 1)


@dataclass(eq=False)
class Network:
    """A trunk and some heads, with parameters that take gradients while they are polished.

    Attributes:
        trunk: The trunk.
        heads: The heads, by the number of their parents.
    """

    trunk: fx.GraphModule
    heads: dict[int, fx.GraphModule]
    _seen: dict[fx.Node, Any] = field(default_factory=dict)

    @property
    def modules(self) -> list[fx.GraphModule]:
        """The trunk and the heads."""
        return [self.trunk, *self.heads.values()]

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers whose weights are used once, but for those of stems."""
        return [layer for module in self.modules for layer in _layers(module)]

    @cached_property
    def others(self) -> list[nn.Parameter]:
        """The other parameters: embeddings, norms, scales, biases that are added apart, what is used twice."""
        mine = {id(p) for layer in self.layers for p in layer.parameters}
        unmerged = {id(p) for module in self.modules for p in _of_stems(module)}
        found = {id(p): p for module in self.modules for p in module.parameters() if p.is_floating_point()}
        return [p for key, p in found.items() if key not in mine | unmerged]

    def outputs(self, batch: Given) -> Outputs:
        """What the heads give."""
        crossing = self.trunk(*bind_inputs(self.trunk, *batch).values())
        return {model: leaves(head(*crossing)) for model, head in self.heads.items()}

    def watched(self, batch: Given) -> tuple[Outputs, list[tuple[Tensor, Tensor]]]:
        """The same, and what each of ``layers`` took and gave."""
        nodes = {node for layer in self.layers for node in (layer.node, layer.source)}
        seen: dict[fx.Node, Any] = {}
        crossing = _Watched(self.trunk, nodes, seen).run(*bind_inputs(self.trunk, *batch).values())
        found = {model: leaves(_Watched(head, nodes, seen).run(*crossing)) for model, head in self.heads.items()}
        return found, [(seen[layer.source], seen[layer.node]) for layer in self.layers]


class _Watched(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Collection[fx.Node], seen: dict[fx.Node, Any]) -> None:
        super().__init__(module)
        self.nodes, self.seen = nodes, seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.seen[n] = value
        return value


def _layers(module: fx.GraphModule) -> Iterator[Layer]:
    used = parameter_uses(module, module.graph.nodes)
    names = dict(module.named_parameters(remove_duplicate=False))
    for node in module.graph.nodes:
        found, call = linear_of(module, node), named_call(module, node)
        weight = None if found is None else names.get(found.weight)
        if found is None or call is None or weight is None or used[id(weight)] != 1 or STEM in node.meta:
            continue
        bias = names.get(call.parameter(found.bias) or "") if found.bias is not None else None
        own = bias if bias is not None and used[id(bias)] == 1 else None
        yield Layer(node, found.input, weight, own, found.contraction)


def _of_stems(module: fx.GraphModule) -> Iterator[nn.Parameter]:
    """The parameters of nodes that are not merged."""
    for node in module.graph.nodes:
        if STEM in node.meta and node.op == "call_module":
            yield from module.get_submodule(str(node.target)).parameters()
        elif STEM in node.meta and node.op == "get_attr":
            value = dict(module.named_parameters()).get(str(node.target))
            yield from () if value is None else (value,)
