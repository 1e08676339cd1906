"""Records a model's forward as an fx graph while it runs on fake tensors.

The forward runs on fake tensors, not on proxies: shapes, dtypes and devices are plain Python values,
isinstance and len and iteration work, and only the batch size is symbolic. A ``TorchFunctionMode`` sees each
call of torch and writes it down as a node; modules of torch.nn become ``call_module`` nodes, everything else
is looked into. Which node made a tensor is known by the tensor's identity.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxzip.graphs import call_writes
from fxzip.passes.trace.autocast import is_on, without_autocast
from fxzip.passes.trace.calls import (
    LOOKED_INTO,
    READS_ARRAYS,
    READS_VALUES,
    call_of,
    is_constant,
    with_free_axis,
)
from fxzip.passes.trace.constants import constant_value
from fxzip.passes.trace.copies import is_torchs, title_of
from fxzip.passes.trace.writer import GraphWriter
from fxzip.passes.trace.writes import changes_shape
from fxzip.rules.registry import find_entry


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is a node of the graph, and not looked into.

    A module of a class that a rule was registered for is one; and torch's own layers without parts, and without tensors
    besides their parameters and buffers: weights that a parametrization or a hook computes (weight_norm) are no leaf's,
    they belong in the graph.
    """
    home = type(module).__module__
    if not home.startswith("torch.") and find_entry(type(module)) is not None:
        return True
    own = home.startswith("torch.nn.") and not home.startswith("torch.nn.utils.")
    computed = any(isinstance(value, Tensor) for value in module.__dict__.values())
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return own and not computed and not container and next(module.children(), None) is None


class GraphRecorder(GraphWriter, TorchFunctionMode):
    """Writes each call of torch on known tensors into ``graph``.

    Args:
        model: A copy that nobody else uses: its modules' ``forward`` are wrapped until `release`.

    Attributes:
        graph: The graph so far.
        attributes: What its ``get_attr`` and ``call_module`` targets stand for.
        ignored: The hooks that could not be recorded, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        GraphWriter.__init__(self, model)
        TorchFunctionMode.__init__(self)
        self._model = model
        self._recording = True
        self._wrapped: list[tuple[nn.Module, object]] = []
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
        own = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
        tensors = [t for t in own if isinstance(t, Tensor)]
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
