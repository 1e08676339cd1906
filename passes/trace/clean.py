"""What a fresh graph is freed of, and the GraphModule that holds just what its graph uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxzip.graphs import attribute, does_nothing, drop_dead_code
from fxzip.passes.trace.functional import functionalise, has_writes


def clean(graph_module: fx.GraphModule, values: Callable[[fx.GraphModule], dict[fx.Node, Any]]) -> fx.GraphModule:
    """``graph_module`` in eval mode, without what does nothing there, without writes to memory, without dead code.

    Args:
        graph_module: A fresh graph, which is changed.
        values: Gives what each node gives, as fake tensors; asked for only where a node writes to memory.
    """
    graph_module.eval()
    graph = graph_module.graph
    for node in list(graph.nodes):
        if does_nothing(graph_module, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    if has_writes(graph_module):
        functionalise(graph_module, values(graph_module))
    drop_dead_code(graph_module)
    attributes = {
        str(node.target): attribute(graph_module, str(node.target))
        for node in graph.nodes
        if node.op in {"get_attr", "call_module"}
    }
    cleaned = rebuild(graph_module, graph, attributes)
    cleaned.meta.update(graph_module.meta)
    return cleaned


def rebuild(model: nn.Module, graph: fx.Graph, attributes: dict[str, Any]) -> fx.GraphModule:
    """A GraphModule of ``graph`` that holds ``attributes`` and nothing else, in eval mode.

    Buffers that are not in the state dict of ``model`` are not in the result's.
    """
    persistent = set(model.state_dict(keep_vars=True))
    name = type(model).__name__
    graph_module = fx.GraphModule(attributes, graph, class_name=name if name.isidentifier() else "GraphModule")
    for prefix, module in graph_module.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and (f"{prefix}.{key}" if prefix else key) not in persistent:
                module._non_persistent_buffers_set.add(key)
    graph_module.graph.lint()
    return graph_module.eval()
