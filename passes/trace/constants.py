"""Values of what a recorded graph computes from nothing but constants (a causal mask, a table of positions)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxzip.graphs import compute

_MISSING = object()
_NO_MODULE = nn.Module()


def constant_value(graph: fx.Graph, attributes: dict[str, Any], wanted: fx.Node) -> Tensor | None:
    """The real value of a node that depends on no input, no parameter and no chance; None where it does.

    Args:
        graph: The graph so far.
        attributes: What its get_attr nodes stand for.
        wanted: A node of it.
    """
    values: dict[fx.Node, Any] = {}
    with unset_fake_temporarily(), torch._C.DisableTorchFunction(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        for node in graph.nodes:  # all in order: some write into what was made before
            value = _value(node, attributes, values)
            if not torch.equal(torch.get_rng_state(), state):
                torch.set_rng_state(state)
                value = _MISSING
            if value is not _MISSING:
                values[node] = value
            elif node.all_input_nodes and node.all_input_nodes[0] in values and not node.users:
                values.pop(node.all_input_nodes[0])  # perhaps written to, with something that is not constant
    found = values.get(wanted)
    return found if isinstance(found, Tensor) else None


def _value(node: fx.Node, attributes: dict[str, Any], values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        value = attributes[str(node.target)]
        return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else _MISSING
    if node.op not in ("call_function", "call_method") or any(n not in values for n in node.all_input_nodes):
        return _device(node)
    try:
        return compute(_NO_MODULE, node, values.__getitem__)
    except Exception:
        return _MISSING


def _device(node: fx.Node) -> Any:
    """The device of an input is known; nothing else of it is."""
    if node.op == "call_function" and node.target is getattr and node.args[1] == "device":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source.meta["val"].device
    return _MISSING
