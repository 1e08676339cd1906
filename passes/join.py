"""Join: one head that answers for all, where networks have the same classes, or whose classes make one list.

Heads that are one linear layer each become one: the mean of their weights gives the mean of their outputs, and as least
squares are linear in what is fitted to, it is the layer that a refit to the mean of the parents' outputs would give.
Any others stand side by side in one graph, and their outputs are joined.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.errors import OptionError
from fxzip.graphs import attribute, linear_of
from fxzip.joint import CONCAT, MEAN, PRODUCT, Joint, class_axis
from fxzip.passes.refit.slots import fill, slot


def check_joinable(names: Sequence[str], models: Sequence[fx.GraphModule], joint: Joint) -> None:
    """Raise unless all models give one tensor, of the same shape but for the classes that are put in one list.

    Raises:
        OptionError: They do not; both shapes are named.
    """
    shapes = [_output_shape(model) for model in models]
    for name, shape in zip(names, shapes, strict=True):
        if shape is None:
            raise OptionError(f"one answer from all wants models that give one tensor; {name} gives several, or none")
        if _compared(shape, joint) != _compared(shapes[0], joint):
            raise OptionError(
                f"one answer from all wants outputs of one shape; {names[0]} gives {_shown(shapes[0])}, {name} gives "
                f"{_shown(shape)}: leave out heads= for a head each"
            )


def _compared(shape: tuple[str, ...] | None, joint: Joint) -> object:
    """What must agree of the shape of an output, (classes,), (tokens, classes) or (classes, height, width)."""
    if joint.how != CONCAT or not shape:
        return shape
    axis = class_axis(len(shape) + 1)
    axis = axis - 1 if axis > 0 else len(shape) + axis
    return (*shape[:axis], "", *shape[axis + 1 :])


def join(heads: Sequence[fx.GraphModule], joint: Joint) -> fx.GraphModule:
    """One head from all.

    Args:
        heads: Take the same tensors, and give one each; they stay as they are.
        joint: How their outputs become one.
    """
    layers = [_only_layer(head) for head in heads]
    if joint.how == MEAN and all(layer is not None for layer in layers):
        return _one_layer(heads, [layer for layer in layers if layer is not None], joint)
    return _side_by_side(heads, joint)


def _only_layer(head: fx.GraphModule) -> fx.Node | None:
    """The linear layer that a head is; None if it is more than that."""
    result = head.graph.output_node().args[0]
    others = (node for node in head.graph.nodes if node is not result)
    if not isinstance(result, fx.Node) or any(n.op not in ("placeholder", "get_attr", "output") for n in others):
        return None
    found = linear_of(head, result)
    return result if found is not None and found.input.op == "placeholder" else None


def _one_layer(heads: Sequence[fx.GraphModule], layers: Sequence[fx.Node], joint: Joint) -> fx.GraphModule:
    """A copy of the first head with the mean of all weights and biases."""
    made = copy.deepcopy(heads[0])
    node = next(n for n in made.graph.nodes if n.name == layers[0].name)
    found = [linear_of(head, layer) for head, layer in zip(heads, layers, strict=True)]
    first = found[0]
    assert first is not None
    weights, biases = [], []
    for head, layer, linear in zip(heads, layers, found, strict=True):
        assert linear is not None
        weights.append(attribute(head, linear.weight).detach().double())
        bias = slot(head, layer, linear.bias) if linear.bias is not None else None
        biases.append(None if bias is None else bias.double())
    with torch.no_grad():
        weight = attribute(made, first.weight)
        weight.copy_(joint(weights))
        known = next((bias for bias in biases if bias is not None), None)
        if first.bias is not None and known is not None:
            fill(
                made, node, first.bias, joint([torch.zeros_like(known) if b is None else b for b in biases]).to(weight)
            )
    for parameter in made.parameters():  # a bias that was filled takes none
        parameter.requires_grad_(weight.requires_grad)
    made.recompile()
    return made


def _side_by_side(heads: Sequence[fx.GraphModule], joint: Joint) -> fx.GraphModule:
    """All heads in one graph, and what joins their outputs."""
    root, graph = nn.Module(), fx.Graph()
    inputs = [graph.node_copy(node) for node in heads[0].graph.find_nodes(op="placeholder")]
    outputs: list[fx.Node] = []
    for number, head in enumerate(heads):
        values: dict[fx.Node, fx.Node] = dict(zip(head.graph.find_nodes(op="placeholder"), inputs, strict=True))
        root.add_module(f"head{number}", head)
        for node in head.graph.nodes:
            if node.op not in ("placeholder", "output"):
                values[node] = graph.node_copy(node, values.__getitem__)
                if node.op in ("get_attr", "call_module"):
                    values[node].target = f"head{number}.{node.target}"
        result: Any = head.graph.output_node().args[0]
        outputs.append(values[result])
    if joint.how == PRODUCT:
        axis = class_axis(outputs[0].meta["val"].dim())
        outputs = [_call(graph, F.log_softmax, output, axis) for output in outputs]
    if joint.how == CONCAT:
        graph.output(graph.call_function(torch.cat, (outputs, class_axis(outputs[0].meta["val"].dim()))))
        return copy.deepcopy(fx.GraphModule(root, graph, class_name="Head")).eval()
    scaled = [_call(graph, operator.mul, o, share) for o, share in zip(outputs, joint.shares, strict=True)]
    total = scaled[0]
    for other in scaled[1:]:
        total = _call(graph, operator.add, total, other)
    graph.output(total)
    return copy.deepcopy(fx.GraphModule(root, graph, class_name="Head")).eval()


def _call(graph: fx.Graph, function: Any, value: fx.Node, other: Any) -> fx.Node:
    node = graph.call_function(function, (value, other))
    node.meta["val"] = value.meta.get("val")
    return node


def _output_shape(model: fx.GraphModule) -> tuple[str, ...] | None:
    """The traced shape of a model's only output, without its batch size."""
    result = model.graph.output_node().args[0]
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    return tuple(str(size) for size in value.shape[1:]) if isinstance(value, Tensor) else None


def _shown(shape: tuple[str, ...] | None) -> str:
    return f"({', '.join(('batch', *(shape or ())))})"
