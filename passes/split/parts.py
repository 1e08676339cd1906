"""Parts: modules made of nodes of the parents' graphs, with parameters of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, fx

from fxzip.graphs import drop_dead_nodes


def part(
    root: fx.GraphModule, graph: fx.Graph, name: str, buffers: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    """A GraphModule in eval mode, with copies of the parameters and modules that its graph uses, under their old names.

    Args:
        root: Where the nodes find what they name; it stays as it is.
        graph: The nodes.
        name: The name of the class.
        buffers: What nodes name beside.
    """
    holder = copy.copy(root) if buffers else root
    for key, tensor in (buffers or {}).items():
        holder.register_buffer(key, tensor)
    drop_dead_nodes(graph, holder)
    result = copy.deepcopy(fx.GraphModule(holder, graph, class_name=name))
    result.graph.lint()
    return result.eval()
