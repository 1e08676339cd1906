"""Operations that give other values each time, in eval mode too."""

from __future__ import annotations

import warnings

from torch import fx

from fxzip.graphs import is_random
from fxzip.passes.trace.writes import name_of


def warn_of_chance(graph_module: fx.GraphModule) -> None:
    """Warn of operations of a graph that draw random numbers, by name."""
    found = [f"{node.name} ({name_of(node)})" for node in graph_module.graph.nodes if is_random(node, graph_module)]
    if found:
        warnings.warn(
            f"the model draws random numbers in eval mode, and so will the merged one: {', '.join(found)}", stacklevel=4
        )
