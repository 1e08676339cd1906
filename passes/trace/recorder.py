"""Records a model's forward as an fx graph while it runs on fake tensors.

The forward runs on fake tensors, not on proxies: shapes, dtypes and devices are plain Python values,
isinstance and len and iteration work, and only the batch size is symbolic. A ``TorchFunctionMode`` sees each
call of torch and writes it down as a node; modules of torch.nn become ``call_module`` nodes, everything else
is looked into. Which node made a tensor is known by the tensor's identity.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxzip.errors import TraceError
from fxzip.graphs import call_writes
from fxzip.passes.trace.autocast import is_on, without_autocast
from fxzip.passes.trace.calls import (
    LOOKED_INTO,
    READS_ARRAYS,
    READS_VALUES,
    call_of,
    is_constant,
    is_symbolic,
    with_free_axis,
)
from fxzip.passes.trace.constants import constant_value
from fxzip.passes.trace.copies import is_torchs, title_of
from fxzip.passes.trace.sizes import BatchSizes
from fxzip.passes.trace.writes import Memories, changes_shape


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is torch's own layer, has no parts, and no tensors besides its parameters and buffers.

    Weights that a parametrization or a hook computes (weight_norm) are no leaf's: they belong in the graph.
    """
    home = type(module).__module__
    own = home.startswith("torch.nn.") and not home.startswith("torch.nn.utils.")
    computed = any(isinstance(value, Tensor) for value in module.__dict__.values())
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return own and not computed and not container and next(module.children(), None) is None


class GraphRecorder(TorchFunctionMode):
    """Writes each call of torch on known tensors into ``graph``.

    Args:
        model: A copy that nobody else uses: its modules' ``forward`` are wrapped until `release`.

    Attributes:
        graph: The graph so far.
        attributes: What its ``get_attr`` and ``call_module`` targets stand for.
        ignored: The hooks that could not be recorded, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._model = model
        self._recording = True
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._names = {id(tensor): name for name, tensor in _named_tensors(model)}
        self._sizes = BatchSizes(self.graph, self._node_of)
        self._device_node: fx.Node | None = None
        self._stack: list[tuple[str, type]] = []
        self._wrapped: list[tuple[nn.Module, object]] = []
        self._inputs: list[Tensor] = []
        self._device_type = "cpu"
        self._memories: Memories | None = None
        self._changed: set[int] = set()
        self.ignored: dict[str, str] = {}

    # ---- modules

    def wrap(self) -> None:
        """Makes leaf modules record themselves and the others say where in the model a call happens."""
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            before = module.__dict__.get("forward")
            if is_leaf(module):
                forward = self._leaf_forward(name, module, module.forward)
            else:
                forward = self._inner_forward(name, module, module.forward)
            self._wrapped.append((module, before))
            module.__dict__["forward"] = forward
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                hooks.update({key: self._guarded(name, hook) for key, hook in hooks.items() if not is_torchs(hook)})

    def release(self) -> None:
        """Takes back what `wrap` did, and takes off the hooks: what they compute is in the graph."""
        for module, before in self._wrapped:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        self._wrapped.clear()

    def _guarded(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that may fail on tensors without values: then it is taken to only watch, which `trace` verifies."""

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.ignored[f"{title_of(hook)} of {name or 'the model'}"] = f"{type(error).__name__}: {error}"
                return None

        return run

    def _inner_forward(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._stack.append((name, type(module)))
            try:
                return forward(*args, **kwargs)
            finally:
                self._stack.pop()

        return run

    def _leaf_forward(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        inside = self._inner_forward(name, module, forward)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._recording or is_on(self._device_type) or self._is_made(module):
                return inside(*args, **kwargs)
            node_args, node_kwargs = self._lower(args), self._lower(kwargs)
            self._recording = False
            try:
                result = forward(*args, **kwargs)
            finally:
                self._recording = True
            in_place = bool(getattr(module, "inplace", False))
            if not in_place and any(result is value for value in (*args, *kwargs.values())):
                return result  # an identity: a dropout in eval mode
            self.attributes[name] = module
            self._stack.append((name, type(module)))
            node = self._create("call_module", name, node_args, node_kwargs)
            self._stack.pop()
            return self._bind(result, node, in_place)

        return run

    def _is_made(self, module: nn.Module) -> bool:
        """Whether a tensor of a leaf was set or written to during the run, by a hook for one: then it is no leaf."""
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(isinstance(t, FakeTensor) for t in tensors):
            return True
        memory = self._memories
        return memory is not None and bool(self._changed) and any(memory.of(t) in self._changed for t in tensors)

    # ---- functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._recording:
            return func(*args, **kwargs)
        if func in LOOKED_INTO:
            with self:
                return LOOKED_INTO[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is torch._assert and args and isinstance(args[0], Tensor):
            return None  # a check of values, which fake tensors do not have
        if name in READS_VALUES and args and is_constant(args[0]):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name in READS_VALUES and args and id(args[0]) in self._nodes:
            value = constant_value(self.graph, self.attributes, self._nodes[id(args[0])][1])
            if value is not None:
                with unset_fake_temporarily():
                    return func(value, *args[1:], **kwargs)
        if name in READS_ARRAYS and args and isinstance(args[0], FakeTensor):
            raise DataDependentOutputException(func)  # type: ignore[arg-type]
        if name == "__setitem__":
            return self._set_item(func, args)
        if is_on(self._device_type) and not call_writes(func, args, kwargs):
            return without_autocast(self._device_type, func, args, kwargs, self._call)
        if changes_shape(func) or "out" in kwargs:
            self._keep_values([*args[:1], kwargs.get("out")])
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            self._sizes.note(args, result)
            return result
        return self._record(func, args, kwargs, result)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.__torch_function__(func, (), args, kwargs)

    def _record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        in_place = call_writes(func, args, kwargs) or changes_shape(func)
        if in_place and self._memories is not None and args and isinstance(args[0], Tensor):
            self._changed.add(self._memories.of(args[0]))
        args = with_free_axis(getattr(func, "__name__", ""), args, result)
        near = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        op, target, args = call_of(func, args, kwargs)
        node = self._create(op, target, self._lower(args, near), self._lower(kwargs, near))
        return self._bind(result, node, in_place)

    def _set_item(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        near = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        node_args = self._lower(args, near)
        func(*args)
        self._create("call_function", operator.setitem, node_args, {})

    def _keep_values(self, tensors: list[Any]) -> None:
        """These may get another shape: what nodes gave until now is kept as it is, in the same memory."""
        for node in self.graph.nodes:
            if any(node.meta.get("val") is tensor for tensor in tensors if isinstance(tensor, Tensor)):
                node.meta["val"] = torch.ops.aten.alias.default(node.meta["val"])

    # ---- nodes

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


def _plain(value: Any) -> Any:
    """A model's output made of tuples, lists and dicts only."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
