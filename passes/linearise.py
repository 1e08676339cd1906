"""Linearise: write a network so that norms over linear spaces are RMSNorms without scales.

1. What follows a layer and acts on each of its channels as a line goes into the layer (`fold`).
2. The scale and the shift of a norm go into the layers that read it: W (γ x + β) + b = (W γ) x + (W β + b).
3. A LayerNorm is an RMSNorm of what is centred. All that writes to its stream is centred instead (weights, biases,
   embeddings, class tokens): each is multiplied by 1 - 11ᵀ/n (SliceGPT, arXiv 2401.15024, section 3.2).

The network computes what it did, and any orthogonal map of its linear spaces goes into the weights (`rotate`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.channels import ChannelSpec
from fxzip.graphs import (
    attribute,
    bind_inputs,
    drop_dead_code,
    drop_unused,
    free_name,
    is_static,
    linear_of,
    named_call,
    new_parameter,
)
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.fold import fold
from fxzip.passes.linearity import linearity
from fxzip.passes.linearity.follow import Linearity, State
from fxzip.passes.linearity.linearity import find_linearity
from fxzip.passes.refit.lines import line_of
from fxzip.passes.refit.slots import fill, slot
from fxzip.passes.rotate import turned


def linearise(module: fx.GraphModule, spec: ChannelSpec) -> tuple[fx.GraphModule, ChannelSpec]:
    """A copy of a network, its norms over linear spaces RMSNorms without scales, and the copy's channel spaces.

    Args:
        module: The traced network; it stays as it is.
        spec: Its channel spaces, with the example that it is run on.
    """
    args, kwargs = spec.example
    module = fold(_untied(copy.deepcopy(module)))
    spec = analyse_graph(module, args, kwargs)
    found = find_linearity(module, spec)
    centred = {spec.spaces[number].name for number in found.centring if number not in found.bent}
    with torch.no_grad():
        lines = Lines(module, found)
        lines.run(*bind_inputs(module, args, kwargs).values())
        _plain_norms(module, found, lines.kept)
        drop_dead_code(module)
        drop_unused(module, set(module.state_dict()))
        spec = linearity(module, analyse_graph(module, args, kwargs))
        _centre(module, spec, centred)
    return module, spec


def _untied(module: fx.GraphModule) -> fx.GraphModule:
    """The module, each node with weights of its own, so that what one reads goes into no other's."""
    seen: set[int] = set()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            target = module.get_submodule(str(node.target))
            if id(target) in seen or any(id(p) in seen for p in target.parameters()):
                name = free_name(f"{node.name}_own", dir(module))
                module.add_submodule(name, copy.deepcopy(target))
                node.target = name
            seen.update((id(target), *map(id, target.parameters())))
        elif node.op == "get_attr" and isinstance(value := attribute(module, str(node.target)), nn.Parameter):
            for user in list(node.users)[id(value) not in seen :]:
                user.replace_input_with(node, new_parameter(module, user, "own", value.detach().clone()))
            seen.add(id(value))
    module.recompile()
    return module


class Lines(fx.Interpreter):
    """Carries the scales and the shifts of norms, and of what else acts so on linear spaces, into the layers behind.

    The module runs as it is, on an example; beside each scaled value runs what its scale and its shift are there.

    Attributes:
        kept: For each node that scales and is no norm the node that it scales, in the order of execution.
    """

    def __init__(self, module: fx.GraphModule, found: Linearity) -> None:
        super().__init__(module)
        self.traced, self.found = module, found
        self.kept: dict[fx.Node, fx.Node] = {}
        self._lines: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and what becomes of the scales and shifts in its input."""
        result = super().run_node(n)
        layer = linear_of(self.traced, n)
        if layer is not None and layer.input in self._lines:
            self._absorb(n, *self._lines[layer.input])
        states = self.found.states.get(n, {})
        if any(state in (State.SCALED, State.SHIFTED) and s not in self.found.bent for s, state in states.items()):
            self._lines[n] = self._line(n, result)
        return result

    def _line(self, n: fx.Node, result: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the shift of each element of a node's value."""
        if n in self.found.norms:
            weight, bias = (slot(self.traced, n, name) for name in ("weight", "bias"))
            shift = torch.zeros_like(result) if bias is None else bias.expand_as(result)
            return (torch.ones_like(result) if weight is None else weight.expand_as(result)), shift
        (source,) = (node for node in n.all_input_nodes if not is_static(node) and _is_value(node))
        before = self._lines.get(source, (torch.ones_like(result), torch.zeros_like(result)))
        line = line_of(self.traced, n, source)
        if line is None:
            scale, shift = (self._instead(n, source, part) for part in before)
            return scale, shift
        self.kept[n] = source
        slope, offset = (part.to(result) for part in line)
        return before[0] * slope, before[1] * slope + offset

    def _instead(self, n: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
        """What a node makes of another value of its source."""
        given = fx.node.map_arg((n.args, n.kwargs), lambda node: value if node is source else self.env[node])
        moved: Tensor = getattr(self, n.op)(n.target, *given)
        return moved

    def _absorb(self, n: fx.Node, scale: Tensor, shift: Tensor) -> None:
        """Let a layer's weight have the scale of its input, and its bias the shift."""
        layer = linear_of(self.traced, n)
        assert layer is not None
        columns = [layer.contraction.columns(part) for part in (scale, shift)]
        assert all(bool((part == part[..., :1]).all()) for part in columns), f"{n} reads several scales"
        slope, offset = (part[..., 0].double() for part in columns)
        weight = self.traced.get_parameter(layer.weight)
        packed = layer.contraction.packed(weight.double())
        weight.copy_(layer.contraction.unpacked(packed * slope[:, None]))
        if layer.bias is not None and bool(offset.any()):
            old = slot(self.traced, n, layer.bias)
            added = (packed @ offset[..., None]).reshape(-1).to(weight)
            fill(self.traced, n, layer.bias, added if old is None else old + added)


def _is_value(node: fx.Node) -> bool:
    """Whether a node gives a tensor, and no size."""
    return isinstance(node.meta.get("val"), Tensor)


def _plain_norms(module: fx.GraphModule, found: Linearity, scales: dict[fx.Node, fx.Node]) -> None:
    """Write the norms over linear spaces without scales, and take out what else scales them."""
    for node, number in found.norms.items():
        call = named_call(module, node)
        if number not in found.bent and call is not None:
            node.op, node.target = "call_function", F.rms_norm
            node.args = (call.source("input"), tuple(call.arguments["normalized_shape"]))
            node.kwargs = {"eps": call.arguments["eps"]}
    for node, source in reversed(scales.items()):
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)


def _centre(module: fx.GraphModule, spec: ChannelSpec, names: set[str]) -> None:
    """Multiply all that writes to these spaces by 1 - 11ᵀ/n; what reads them reads the same of what is centred."""
    state = module.state_dict(keep_vars=True)
    for space in (spec[name] for name in names):
        away = torch.eye(space.size, dtype=torch.float64) - 1 / space.size
        for site in space.sites:
            tensor = state[site.parameter]
            tensor.copy_(turned(tensor, site, away.to(tensor)))
