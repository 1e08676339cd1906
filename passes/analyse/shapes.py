"""Every node's value at batch 1, as tensors without memory: what `analyse` knows of shapes.

A traced graph carries what the tracer saw, with a symbolic batch; that is read off where it fits the inputs. Only
nodes without such a value are run, on fake tensors; so is all of a graph that was given, or that other inputs are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxzip.graphs import bind_inputs, placeholders

_RECORDED = ("symbolic", "export")


def propagate_shapes(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every node's value by name, tensors as meta or fake tensors.

    Args:
        module: The network, traced or not.
        args: Positional inputs of batch size 1.
        kwargs: Keyword inputs of batch size 1.
    """
    given = tuple(bind_inputs(module, args, kwargs).values())
    return _Shapes(module, given, _fits(module, given)).values()


def _fits(module: fx.GraphModule, given: tuple[Any, ...]) -> bool:
    """Whether what the tracer saw is there, and was seen on inputs of these sizes."""
    nodes = placeholders(module)
    if module.meta.get("traced_by") not in _RECORDED or len(given) != len(nodes):
        return False
    reader = _Reader()
    seen = [reader.read(node.meta.get("val")) for node in nodes]
    return _sizes(seen) == _sizes(given)


def _sizes(values: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]


class _Reader:
    """Reads recorded values with the batch, the one symbol in them, as 1."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int | float] = {}

    def read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty([self._number(size) for size in value.shape], dtype=value.dtype, device="meta")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self._number(value)
        if isinstance(value, (tuple, list)):
            return tuple(self.read(part) for part in value)
        if isinstance(value, Mapping):
            return {key: self.read(part) for key, part in value.items()}
        return value

    def _number(self, size: Any) -> Any:
        if isinstance(size, (int, float)):
            return size
        expr = size.node.expr
        if expr not in self._numbers:
            value = expr.subs(dict.fromkeys(expr.free_symbols, 1))
            self._numbers[expr] = int(value) if isinstance(size, torch.SymInt) else float(value)
        return self._numbers[expr]


class _Shapes(fx.Interpreter):
    """Runs, on fake tensors, the nodes whose values cannot be read.

    Args:
        module: The network.
        given: A value for each placeholder.
        recorded: Whether the values that nodes carry can be relied on.
    """

    def __init__(self, module: fx.GraphModule, given: tuple[Any, ...], recorded: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.args_iter = iter(given)
        self._recorded = recorded
        self._reader = _Reader()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def values(self) -> dict[str, Any]:
        """Every node's value by name."""
        return {node.name: self._value(node) for node in self.graph.nodes}

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.fetch_attr(str(node.target))
        if self._recorded and "val" in node.meta:
            return self._reader.read(node.meta["val"])
        for source in node.all_input_nodes:
            self._fake(source)
        with self._mode, torch.no_grad():
            value = self._run(node)
            if node.op == "placeholder":
                value = pytree.tree_map_only(Tensor, self._mode.from_tensor, value)
        self.env[node] = value
        return value

    def _run(self, node: fx.Node) -> Any:
        """The node's value; an error says at which node it was (``fxzip_node``)."""
        try:
            return self.run_node(node)
        except Exception as error:
            error.fxzip_node = node.name  # type: ignore[attr-defined]
            raise

    def _fake(self, node: fx.Node) -> None:
        """Give a node that was read the value that others can be run on."""
        if node in self.env:
            return
        if node.op == "get_attr":
            self.env[node] = self.fetch_attr(str(node.target))
            return

        def fake(seen: Tensor) -> Tensor:
            return FakeTensor(self._mode, self._reader.read(seen), seen.device)

        read = pytree.tree_map_only((torch.SymInt, torch.SymFloat), self._reader.read, node.meta["val"])
        self.env[node] = pytree.tree_map_only(Tensor, fake, read)
