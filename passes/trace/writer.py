"""Writes the nodes of a graph that is being recorded: which node made a tensor is known by the tensor's identity."""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxzip.errors import TraceError
from fxzip.passes.trace.calls import is_symbolic
from fxzip.passes.trace.sizes import BatchSizes
from fxzip.passes.trace.writes import Memories


class GraphWriter:
    """A graph that grows, and what is known of the tensors in it.

    Attributes:
        graph: The graph so far.
        attributes: What its ``get_attr`` and ``call_module`` targets stand for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._names = {id(tensor): name for name, tensor in _named_tensors(model)}
        self._sizes = BatchSizes(self.graph, self._node_of)
        self._device_node: fx.Node | None = None
        self._stack: list[tuple[str, type]] = []
        self._inputs: list[Tensor] = []
        self._device_type = "cpu"
        self._memories: Memories | None = None

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        plain = target.strip("_") if op == "call_method" else None  # the name of what `functional` makes of it
        node = self.graph.create_node(op, target, tuple(args), dict(kwargs), plain)
        node.meta["nn_module_stack"] = {name: (name, kind) for name, kind in self._stack if name}
        return node

    def add_input(self, name: str, value: Any) -> None:
        """Adds a placeholder for ``value``, whose tensors are fake."""
        node = self.graph.placeholder(name)
        self._inputs += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if self._inputs:
            self._device_type = self._inputs[0].device.type
            if self._memories is None and isinstance(self._inputs[0], FakeTensor):
                self._memories = Memories(self._inputs[0].fake_mode)
        self._bind(value, node, True)

    def add_output(self, value: Any) -> None:
        """Ends the graph with ``value``."""
        node = self.graph.output(self._lower(_plain(value)))
        node.meta["val"] = value

    def knows_batch(self) -> bool:
        """Whether the inputs' batch size is still symbolic."""
        return any(is_symbolic(tensor.shape[0]) for tensor in self._inputs if tensor.dim() > 0)

    def _bind(self, value: Any, node: fx.Node, same: bool) -> Any:
        """Notes that ``node`` gives ``value``, whose tensors are known by identity from now on.

        A function that gave back its own argument (``contiguous``) would pass its name on; it gives an
        alias unless ``same``, which says that the argument itself is what changed.
        """
        node.meta["val"] = value
        if isinstance(value, Tensor):
            known = id(value) in self._nodes or id(value) in self._names
            if known and not same:
                value = torch.ops.aten.alias.default(value)
                node.meta["val"] = value
            self._know(value, node)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                self._bind_part(part, node, key, same)
        elif isinstance(value, (tuple, list)):
            for index, part in enumerate(value):
                self._bind_part(part, node, index, same)
        return value

    def _bind_part(self, part: Any, node: fx.Node, key: Any, same: bool) -> None:
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part)):
            self._bind(part, self._create("call_function", operator.getitem, (node, key), {}), True)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][1]
        name = self._names.get(id(tensor))
        if name is None:
            name = self._constant_name(tensor)
        self.attributes[name] = tensor
        node = self._create("get_attr", name, (), {})
        node.meta["val"] = tensor
        self._know(tensor, node)
        return node

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = (tensor, node)

    def _constant_name(self, tensor: Tensor) -> str:
        if isinstance(tensor, FakeTensor):
            raise TraceError(
                f"a tensor of shape {tuple(tensor.shape)} came from a call that cannot be followed "
                "(a scripted function, a custom kernel, or a tensor kept from an earlier call)"
            )
        name = f"_tensor_constant{sum(key.startswith('_tensor_constant') for key in self.attributes)}"
        self._names[id(tensor)] = name
        return name

    def _lower(self, value: Any, near: list[Tensor] | None = None) -> Any:
        """``value`` with nodes for the tensors and for the sizes that depend on the batch."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return self._sizes.node_for(value, near or [], self._inputs)
        if isinstance(value, torch.SymBool):
            return bool(value)
        if isinstance(value, torch.device):
            return self._device(value)
        lower = functools.partial(self._lower, near=near)
        if isinstance(value, tuple):
            parts = [lower(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            return [lower(part) for part in value]
        if isinstance(value, Mapping):
            return {key: lower(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(lower(value.start), lower(value.stop), lower(value.step))
        if hasattr(value, "dtype") and hasattr(value, "item"):
            return value.item()  # a scalar of numpy
        return value

    def _device(self, device: torch.device) -> Any:
        """The device of the inputs is a node, so that the graph can move; another is what the model says."""
        if not self._inputs or self._inputs[0].device != device:
            return device
        if self._device_node is None:
            source = self._node_of(self._inputs[0])
            self._device_node = self._create("call_function", getattr, (source, "device"), {})
        return self._device_node


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes; if one has many names, its first name comes last."""
    found: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor):
                found.append((f"{prefix}.{key}" if prefix else key, value))
    return reversed(found)


_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype,
          torch.device, type(None), type(Ellipsis))  # fmt: skip


def _plain(value: Any) -> Any:
    """A model's output made of tuples, lists and dicts only, without those parts by name that no graph can give."""
    if isinstance(value, Mapping):
        return _plain_parts(value)
    if isinstance(value, tuple):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return value


def _plain_parts(parts: Mapping[Any, Any]) -> dict[Any, Any]:
    """The parts that are tensors, plain values or made of these: a language model's cache is an object of its own."""
    left_out = [key for key, part in parts.items() if _is_opaque(part)]
    for key in left_out:
        warnings.warn(
            f"the output {key!r} is a {type(parts[key]).__name__}, which a graph cannot give: the merged network's "
            "output has no such part (`as_models()` gives models that have)",
            stacklevel=2,
        )
    return {key: _plain(part) for key, part in parts.items() if key not in left_out}


def _is_opaque(value: Any) -> bool:
    structured = isinstance(value, (Mapping, tuple, list)) or dataclasses.is_dataclass(value)
    return not structured and not isinstance(value, _PLAIN)
