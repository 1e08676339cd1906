"""Nodes for the sizes that depend on the batch: the only numbers that a traced graph computes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxzip.errors import TraceError


class BatchSizes:
    """Writes symbolic sizes into ``graph``.

    Args:
        graph: The graph that is being recorded.
        node_of: Gives the node of a known tensor.
    """

    def __init__(self, graph: fx.Graph, node_of: Callable[[Tensor], fx.Node]) -> None:
        self._graph = graph
        self._node_of = node_of
        self._known: dict[tuple[Any, ...], fx.Node] = {}
        self._last_read: list[Tensor] = []

    def note(self, args: Sequence[Any], result: Any) -> None:
        """Remembers the tensor whose size a model read last: that is where a size most likely comes from."""
        read = any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves(result))
        if read and args and isinstance(args[0], Tensor):
            self._last_read = [args[0]]

    def node_for(
        self, size: torch.SymInt | torch.SymFloat, near: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> fx.Node | int | float:
        """A node that computes ``size`` from a size of a tensor, or the number if it is one.

        The nearest tensor is taken, so that a graph can be cut without carrying sizes across the cut: one of
        the call's own, the one whose size was read last, an input.

        Raises:
            TraceError: No tensor has the batch on an axis.
        """
        expr: Any = size.node.expr
        if expr.is_number:
            return int(size) if isinstance(size, torch.SymInt) else float(size)
        (symbol,) = expr.free_symbols
        sizes: list[tuple[Tensor, int, Any]] = [
            (tensor, axis, own) for tensor in (*near, *self._last_read, *inputs) for axis, own in _open_sizes(tensor)
        ]
        for tensor, axis, own in sizes:
            if own == expr:
                return self._size(tensor, axis)
        for tensor, axis, own in sizes:
            if (own / symbol).is_Integer:
                return self._computed(expr, symbol, self._size(tensor, axis), int(own / symbol))
        raise TraceError(f"the size {expr} cannot be computed from the size of any tensor")

    def _size(self, tensor: Tensor, axis: int) -> fx.Node:
        key = (self._node_of(tensor), axis)
        if key not in self._known:
            self._known[key] = self._graph.call_method("size", key)
            self._known[key].meta["val"] = tensor.shape[axis]
        return self._known[key]

    def _computed(self, expr: Any, symbol: Any, size: fx.Node, multiple: int) -> fx.Node:
        """A node for ``expr``, which is in terms of ``symbol``, from a size that is ``multiple`` times it."""
        if (size, expr) not in self._known:
            batch = self._graph.call_function(operator.floordiv, (size, multiple)) if multiple != 1 else size
            proxy = fx.Proxy(batch, fx.proxy.GraphAppendingTracer(self._graph))
            self._known[size, expr] = sympy_interp(PythonReferenceAnalysis, {symbol: proxy}, expr).node
        return self._known[size, expr]


def _open_sizes(tensor: Tensor) -> Iterator[tuple[int, Any]]:
    """The axes whose sizes depend on the batch, each with the expression that says how."""
    sizes: tuple[Any, ...] = tuple(tensor.shape)
    for axis, size in enumerate(sizes):
        if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
            yield axis, size.node.expr
