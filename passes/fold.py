"""The fold pass: each layer and the lines behind it (BatchNorm, layer scale, an added bias) become one layer.

A merged network has its BatchNorms folded already, and a network that is to be merged with it has not: the two agree in
no layer. After this pass both have the same form, in which every layer that can have a bias has one, and sums
take their operands in the order of execution.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxzip.graphs import drop_dead_code, drop_unused, is_static
from fxzip.learning import learn_as, learns
from fxzip.passes.refit.layers import Layer, find_layer
from fxzip.passes.refit.lines import line_of
from fxzip.passes.refit.slots import Uses, slot
from fxzip.rules.keys import key_of


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """Fold what follows layers into them; the module is changed and returned, and computes the same."""
    known, uses = learns([module]), Uses(module)
    with torch.no_grad():
        for node in list(module.graph.nodes):
            layer = find_layer(module, node, uses)
            if layer is not None and layer.takes_bias:
                bias = _bias(module, layer)
                layer.write(module, layer.prior(module), bias)
                layer.cut_out(module)
    _order_sums(module)
    drop_dead_code(module)
    drop_unused(module, set(module.state_dict()))
    learn_as(module, known)
    module.graph.lint()
    module.recompile()
    return module


def _order_sums(module: fx.GraphModule) -> None:
    """Let sums take their operands in the order of execution: `reuse` turns them around where it saves memory."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        computed = [arg for arg in node.args if isinstance(arg, fx.Node) and not is_static(arg)]
        if node.op in ("call_function", "call_method") and key_of(node.target) == "add" and len(computed) == 2:
            node.args = tuple(sorted(computed, key=order.__getitem__))


def _bias(module: fx.GraphModule, layer: Layer) -> Tensor:
    """What a layer and its chain add to W x: (groups, outputs), float64."""
    shape = layer.contraction.packed(module.get_parameter(layer.weight)).shape[:2]
    own = None if layer.bias is None else slot(module, layer.node, layer.bias)
    total = layer.scale.new_zeros(layer.scale.shape) if own is None else own.double().reshape(-1)
    before = layer.node
    for node in layer.chain:
        line = line_of(module, node, before)
        assert line is not None
        slope, offset = (layer.contraction.vector(part) for part in line)
        assert slope is not None
        assert offset is not None
        total, before = total.to(slope.device) * slope + offset, node
    return total.reshape(shape)
