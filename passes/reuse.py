"""The reuse pass: activations and sums write over an input that nobody reads again.

Tracing makes every operation give a new tensor, so that any node's value can be looked at. Where a graph is
only run, that costs a pass over fresh memory for each ReLU and each residual add (on ResNet-50, 8 % of the
time on one core). This pass gives such nodes their in-place form back.

1. The value written to is fresh memory, as its rule says (a convolution's, a linear's, a norm's, a sum's), not a
   view, an input or a parameter.
2. Nobody reads it later: other users come before, and what they give is not used by anyone (observers).
3. The result has its shape, dtype and strides (another memory format changes what later kernels round); a
   node without ``val`` in its meta is left alone.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from fxzip.graphs import is_fresh

# Sums only: they commute, so that either operand may be written to, and autograd keeps neither.
_SUMS: set[Any] = {operator.add, torch.add}


def reuse_memory(module: fx.GraphModule) -> None:
    """Rewrite ``module`` so that what can work in place does. Submodules that change are replaced by copies."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    # Before anything is rewritten: a sum that the model itself makes in place may be a view of what is read later.
    fresh = {node for node in module.graph.nodes if is_fresh(module, node)}
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "call_module" and getattr(module.get_submodule(str(node.target)), "inplace", None) is False:
            calls[str(node.target)].append(node)
        elif node.op == "call_function":
            _rewrite(node, fresh, order)
    for target, nodes in calls.items():
        if all(len(node.args) == 1 and _may_write(node, node.args[0], fresh, order) for node in nodes):
            writing = copy.copy(module.get_submodule(target))
            setattr(writing, "inplace", True)  # noqa: B010  (nn.Module's stub knows tensors and modules only)
            module.set_submodule(target, writing)
    module.recompile()


def _rewrite(node: fx.Node, fresh: set[fx.Node], order: dict[fx.Node, int]) -> None:
    if node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
        for first, second in (node.args, reversed(node.args)):
            if isinstance(second, fx.Node) and _may_write(node, first, fresh, order):
                node.target, node.args = operator.iadd, (first, second)
                return
    elif "inplace" in _parameters(node.target) and len(node.args) == 1 and not node.kwargs.get("inplace"):
        node.update_kwarg("inplace", _may_write(node, node.args[0], fresh, order))


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin
        return ()


def _may_write(node: fx.Node, value: Any, fresh: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """The three conditions at the head of this file, for ``node`` writing to ``value``."""
    if value not in fresh or not _alike(node, value):
        return False
    others = [user for user in value.users if user is not node]
    return all(not user.users and user.op != "output" and order[user] < order[node] for user in others)


def _alike(node: fx.Node, value: fx.Node) -> bool:
    ours, theirs = node.meta.get("val"), value.meta.get("val")
    if not (isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)):
        return False
    # As text: comparing symbolic batches as numbers would write a guard.
    layouts = [[*map(str, (*value.shape, *value.stride()))] for value in (ours, theirs)]
    return ours.dtype == theirs.dtype and layouts[0] == layouts[1]
