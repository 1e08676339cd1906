"""The second way to a graph: non-strict torch.export with a dynamic batch, written like a traced graph."""

from __future__ import annotations

import operator
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
        Exception: Whatever torch.export raises.
    """
    if batch_size(*inputs) < 2:
        inputs = with_batch_size(*inputs, 2)  # export takes a size of 1 for a constant
    args, kwargs = inputs
    size, batch = batch_size(args, kwargs), torch.export.Dim("batch")

    def dynamic(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return {0: batch} if batched else None

    shapes = pytree.tree_map(dynamic, bound_arguments(model, args, kwargs))
    with unheard():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return plain_given(exported.module(check_guards=False), inputs)


def plain_given(graph_module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """A GraphModule that was given, its inputs before all else, and without torch.export's own calling convention."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="placeholder"):
        if node is first:
            first = first.next
        else:
            first.prepend(node)
    if type(graph._codegen) is fx.graph.CodeGen:
        return graph_module
    return _plain_signature(graph_module, bound_arguments(graph_module, *inputs))


def _plain_signature(graph_module: fx.GraphModule, named: dict[str, Any]) -> fx.GraphModule:
    """Placeholders named as the model's inputs, and the model's own output structure, without pytree code."""
    graph = graph_module.graph
    leaves = placeholders(graph_module)
    for name, value in named.items():
        count = pytree.tree_structure(value).num_leaves
        if count > len(leaves):
            raise TraceError(f"torch.export's graph takes fewer tensors than the inputs hold, up to {name}")
        _join(graph, name, value, leaves[:count])
        del leaves[:count]
    codegen: Any = graph._codegen
    output = graph.output_node()
    flat = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = (pytree.tree_unflatten(list(flat), codegen.pytree_info.out_spec),)
    graph.set_codegen(fx.graph.CodeGen())
    attributes = {
        str(node.target): attribute(graph_module, str(node.target))
        for node in graph.nodes
        if node.op in {"get_attr", "call_module"}
    }
    return rebuild(graph_module, graph, attributes)


def _join(graph: fx.Graph, name: str, value: Any, leaves: list[fx.Node]) -> None:
    """One placeholder for an input: torch.export has one for each tensor of a nest, which are taken out of it here."""
    paths, structure = pytree.tree_flatten_with_path(value)
    if structure.is_leaf():
        leaves[0].target = name
        return
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(leaves[0] if leaves else behind):
        whole = graph.placeholder(name)
    whole.meta["val"] = pytree.tree_unflatten([leaf.meta.get("val") for leaf in leaves], structure)
    with graph.inserting_before(behind):
        for (path, _), leaf in zip(paths, leaves, strict=True):
            part = whole
            for key in path:
                part = _part(graph, part, key)
            leaf.replace_all_uses_with(part)
            graph.erase_node(leaf)


def _part(graph: fx.Graph, whole: fx.Node, key: Any) -> fx.Node:
    if isinstance(key, pytree.GetAttrKey):
        part = graph.call_function(getattr, (whole, key.name))
    else:
        part = graph.call_function(operator.getitem, (whole, key.key if hasattr(key, "key") else key.idx))
    part.meta["val"] = key.get(whole.meta["val"])
    return part
