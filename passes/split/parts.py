"""Parts: modules made of nodes of the parents' graphs, with parameters of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import fx

from fxzip.graphs import attribute, drop_dead_code


def part(root: fx.GraphModule, graph: fx.Graph, name: str, more: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """A GraphModule in eval mode, with copies of the parameters and modules that its graph uses, under their old names.

    Args:
        root: Where the nodes find what they name; it stays as it is.
        graph: The nodes.
        name: The name of the class.
        more: What nodes name beside, by qualified name.
    """
    own = dict(more or {})
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target) not in own:
            own[str(node.target)] = attribute(root, str(node.target))
    module = fx.GraphModule(own, graph, class_name=name)
    drop_dead_code(module)
    result = copy.deepcopy(fx.GraphModule(module, module.graph, class_name=name))
    result.graph.lint()
    return result.eval()
