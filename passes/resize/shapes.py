"""Shapes of a resized graph: what its calls ask of sizes, and whether each value has the shape that the labels say."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.batches import with_batch_size
from fxzip.passes.analyse.shapes import propagate_shapes
from fxzip.passes.resize.layout import Sizes
from fxzip.rules.sizing import SizedCall, SizeError

SCALED = "scaled"
"""Key in the meta of nodes that resizing puts in: they compute a size from the batch."""


def old_shapes(module: fx.GraphModule, spec: ChannelSpec) -> dict[str, Any]:
    """Every node's value as it was, by name, tensors without memory, batch 1."""
    args, kwargs = spec.example
    return propagate_shapes(module, *with_batch_size(args, kwargs, 1))


class Call(SizedCall):
    """A node of a graph that is being resized.

    Attributes:
        sizes: The new sizes.
        values: Every node's value as it was, by name.
    """

    def __init__(self, node: fx.Node, module: nn.Module | None, sizes: Sizes, values: Mapping[str, Any]) -> None:
        super().__init__(node, module)
        self.sizes, self.values = sizes, values

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value as it was, batch 1."""
        return tuple(self.values[node.name].shape)

    def part(self, node: fx.Node, axis: int, start: int, stop: int) -> int:
        """How many positions there are in the place of ``start`` to ``stop`` on an axis of a node's value."""
        return self.sizes.of_part(node.name, axis, self.shape(node)[axis], start, stop)

    def changes(self, node: fx.Node, axis: int) -> bool:
        """Whether spaces lie along an axis of a node's value, or some of them, that get other numbers of channels."""
        return self.sizes.change(node.name, axis)

    def scalar(self, node: fx.Node, old: int, new: int) -> fx.Node:
        """A number of the graph that is computed from the batch, times ``new / old``."""
        graph = self.node.graph
        with graph.inserting_before(self.node):
            each = graph.call_function(operator.floordiv, (node, old))
            found = graph.call_function(operator.mul, (each, new))
        for made, value in ((each, 1), (found, new)):
            made.meta[SCALED] = True
            if "val" in node.meta:
                made.meta["val"] = node.meta["val"] // old * value
        return found


def check_shapes(module: fx.GraphModule, sizes: Sizes, before: Mapping[str, Any]) -> None:
    """Run a resized graph on tensors without memory, and record the shapes, which must be as the labels say.

    Args:
        module: The graph, whose nodes carry what was recorded of the old one.
        sizes: The new sizes.
        before: Every node's value as it was, by name.

    Raises:
        SizeError: A shape is another one, or the graph does not run.
    """
    recorded = module.meta.pop("traced_by", None)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs what is caught here
    quiet, log.disabled = log.disabled, True
    args, kwargs = with_batch_size(*sizes.spec.example, 1)
    try:
        after = propagate_shapes(module, args, kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = str(error).splitlines()[0] if str(error) else repr(error)
        raise SizeError(f"it does not run: {said}", getattr(error, "fxzip_node", "")) from error
    finally:
        log.disabled = quiet
        if recorded is not None:
            module.meta["traced_by"] = recorded
    for node in module.graph.nodes:
        old, new = before.get(node.name), after.get(node.name)
        if node.op == "output" or old is None or new is None:
            continue
        if isinstance(old, Tensor) and node.op != "get_attr":
            size = tuple(old.shape)
            wanted = _wanted(sizes, node, size)
            if tuple(new.shape) != wanted:
                raise SizeError(f"it would have the shape {tuple(new.shape)} in the place of {wanted}", node.name)
        if "val" in node.meta:
            node.meta["val"] = _recorded(node.meta["val"], old, new)


def _wanted(sizes: Sizes, node: fx.Node, size: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(sizes.of_part(node.name, axis, n, 0, n) for axis, n in enumerate(size))
    except SizeError as error:
        raise SizeError(str(error), node.name) from error


def _recorded(seen: Any, old: Any, new: Any) -> Any:
    """What was recorded of a node, with its new sizes; those that depend on the batch still do."""
    if isinstance(seen, (tuple, list)) and isinstance(new, (tuple, list)):
        return type(seen)(_recorded(*parts) for parts in zip(seen, old, new, strict=True))
    if not isinstance(seen, Tensor) or tuple(old.shape) == tuple(new.shape):
        return seen
    sizes = [
        was if before == after else was // before * after if isinstance(was, torch.SymInt) else after
        for was, before, after in zip(seen.shape, old.shape, new.shape, strict=True)
    ]
    return seen.new_empty(sizes)
