"""The second way to a graph: non-strict torch.export with a dynamic batch, written like a traced graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs, batch_size, with_batch_size
from fxzip.errors import TraceError
from fxzip.graphs import attribute, placeholders
from fxzip.passes.trace.clean import rebuild
from fxzip.passes.trace.record import bound_arguments
from fxzip.surroundings import unheard


def export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The graph of aten operations that torch.export gives, with plain placeholders and the model's names.

    Raises:
        TraceError: An input is a nest of tensors, which a plain placeholder cannot be.
        Exception: Whatever torch.export raises.
    """
    if batch_size(*inputs) < 2:
        inputs = with_batch_size(*inputs, 2)  # export takes a size of 1 for a constant
    args, kwargs = inputs
    size, batch = batch_size(args, kwargs), torch.export.Dim("batch")

    def dynamic(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return {0: batch} if batched else None

    named = bound_arguments(model, args, kwargs)
    shapes = pytree.tree_map(dynamic, named)
    with unheard():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return _plain_signature(exported.module(check_guards=False), named)


def plain_given(graph_module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """A GraphModule that was given, its inputs before all else, and without torch.export's own calling convention."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    if type(graph._codegen) is not fx.graph.CodeGen:
        graph_module = _plain_signature(graph_module, bound_arguments(graph_module, *inputs))
    else:
        _put_inputs_first(graph)
    return graph_module


def _put_inputs_first(graph: fx.Graph) -> None:
    """Cuts count on it: what comes before the inputs is no cut."""
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="placeholder"):
        if node is first:
            first = first.next
        else:
            first.prepend(node)


def _plain_signature(graph_module: fx.GraphModule, named: dict[str, Any]) -> fx.GraphModule:
    """Placeholders named as the model's inputs, and the model's own output structure, without pytree code."""
    graph = graph_module.graph
    inputs = placeholders(graph_module)
    if len(inputs) != len(named):
        raise TraceError("an input that is a list or dict of tensors is not supported by torch.export's way")
    for node, name in zip(inputs, named, strict=True):
        node.target = name
    codegen: Any = graph._codegen
    output = graph.output_node()
    flat = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = (pytree.tree_unflatten(list(flat), codegen.pytree_info.out_spec),)
    graph.set_codegen(fx.graph.CodeGen())
    _put_inputs_first(graph)
    attributes = {
        str(node.target): attribute(graph_module, str(node.target))
        for node in graph.nodes
        if node.op in {"get_attr", "call_module"}
    }
    return rebuild(graph_module, graph, attributes)
