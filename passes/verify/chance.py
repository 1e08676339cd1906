"""What a network draws at random is held still while it is checked, so that two runs of it can be compared.

Its channels in another order meet the same numbers drawn, no longer those that are meant for them. So a copy to check
with draws none: what falls on a value at random (dropout) lets it pass, and what is drawn by itself is the same number
at every place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.graphs import draws_in_training, is_random


def hold_still(module: fx.GraphModule) -> None:
    """Let the random operations of a graph give the same always; nodes keep their names and what they read."""
    found = [node for node in module.graph.nodes if is_random(node, module)]
    for node in found:
        node.target = _still(module, node)
        node.op = "call_function"
    if found:
        module.recompile()


def _still(module: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    if draws_in_training(node):
        return _passed
    if node.op == "call_module":
        return _evened(module.get_submodule(str(node.target)))
    if getattr(node.target, "__name__", "") == "scaled_dot_product_attention":
        return _without_dropout
    return _evened(getattr(Tensor, node.target) if isinstance(node.target, str) else node.target)


def _passed(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input


def _without_dropout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)


def _evened(function: Callable[..., Any] | nn.Module) -> Callable[..., Any]:
    """The function, with one number at every place of what it gives: 0 where it may be an index, else a half."""

    def evened(*args: Any, **kwargs: Any) -> Any:
        drawn = function(*args, **kwargs)
        return torch.full_like(drawn, 0.5) if drawn.is_floating_point() else torch.zeros_like(drawn)

    return evened
