"""A graph without mutation: no node writes to memory that another node, or the user, can see.

1. Which nodes look at the same memory is read off the values that the graph has on fake tensors.
2. What an in-place operation writes is computed by its plain form, in the dtype of what is written to.
3. It is put back, view by view, into the tensor that the memory was made as (`views`).
4. Later uses of that tensor, and of all its views, read the new value: the views are taken again where they are used.
5. A graph that writes to nothing is left as it is.
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxzip.errors import TraceError
from fxzip.graphs import writes_in_place
from fxzip.passes.trace.aliases import Alias, Memory, alike
from fxzip.passes.trace.assign import assigned
from fxzip.passes.trace.views import undone
from fxzip.passes.trace.writes import Call, Memories, name_of, plain_call, without_shape_changes, written

_EMPTY: dict[Any, Any] = {
    "empty": torch.zeros,
    "empty_like": torch.zeros_like,
    "new_empty": "new_zeros",
}
"""What is filled later: with zeros, so that what stays unfilled is the same each time."""
_FILLS = {"fill_": 1, "zero_": None}
_COPIES_ON_CPU = {"channel_shuffle", "native_channel_shuffle"}
"""What PyTorch computes by a kernel of its own on the CPU, and elsewhere by views, as of fake tensors."""


def functionalise(module: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Rewrite ``module`` so that none of its nodes writes to memory. Dead code is left for `clean`.

    Args:
        module: A traced graph.
        values: What each node gives, as fake tensors that share memory as the real ones do.

    Raises:
        TraceError: Something is written to in a way that is not known; the node is named.
    """
    Functionaliser(module, values).run()


def has_writes(module: fx.GraphModule) -> bool:
    """Whether a node of the graph writes to memory."""
    return any(writes_in_place(node, module) for node in module.graph.nodes)


class Functionaliser:
    """Visits the nodes in order; see `functionalise`."""

    def __init__(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        self.module, self.graph = module, module.graph
        self._values = values
        self._aliases: dict[fx.Node, Alias] = {}
        self._memories: dict[int, Alias] = {}
        self._copies: dict[int, list[Memory]] = defaultdict(list)
        fakes = [
            leaf for value in values.values() for leaf in pytree.tree_leaves(value) if isinstance(leaf, FakeTensor)
        ]
        self._mode = fakes[0].fake_mode if fakes else FakeTensorMode(allow_non_fake_inputs=True)
        self._memory_of = Memories(self._mode).of
        self._recorded = all("val" in node.meta for node in module.graph.find_nodes(op="placeholder"))
        self._current: fx.Node | None = None

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.nodes):
            self._current = node
            without_shape_changes(node)
            _fill_empty(node)
            with self.graph.inserting_before(node):
                inputs = self._bring_up_to_date(node)
            if writes_in_place(node, self.module):
                with self.graph.inserting_before(node.next):
                    self._write(node, inputs)
            else:
                self._look(node, inputs)
        for node in reversed(list(self.graph.nodes)):
            if node.op != "call_module" and writes_in_place(node, self.module):
                self.graph.erase_node(node)  # what it wrote is computed by others
        for part in self.module.modules():
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]

    # ---- what nodes look at

    def _bring_up_to_date(self, node: fx.Node) -> dict[fx.Node, Alias]:
        """Let a node read its inputs as they are by now; what each of them, as it is by now, looks at."""
        inputs = {n: self._now(self._aliases[n]) if n in self._aliases else n for n in node.all_input_nodes}
        if any(old is not new for old, new in inputs.items()):
            node.args = fx.node.map_arg(node.args, inputs.__getitem__)
            node.kwargs = fx.node.map_arg(node.kwargs, inputs.__getitem__)
        return {new: self._aliases[old] for old, new in inputs.items() if old in self._aliases}

    def _now(self, alias: Alias) -> fx.Node:
        """The node that gives what ``alias`` looks at as it is by now: the view is taken again if need be."""
        if alias.version != alias.memory.version:
            if alias.parent is None:
                alias.now = alias.memory.now
            elif alias.made is None:
                raise TraceError(
                    f"{alias.now.name} shares memory with a tensor that was written to, in a way that is not known; "
                    "give the model a copy of its own (clone()) of one of them"
                )
            else:
                parent, source = self._now(alias.parent), alias.source
                alias.now = self.graph.node_copy(alias.made, lambda n: parent if n is source else n)
                self._values[alias.now] = self._values[alias.made]
            alias.version = alias.memory.version
        return alias.now

    def _look(self, node: fx.Node, inputs: dict[fx.Node, Alias]) -> None:
        """Note which memory a node looks at."""
        keys = [
            self._memory_of(leaf) for leaf in pytree.tree_leaves(self._values.get(node)) if isinstance(leaf, Tensor)
        ]
        if not keys or node.op == "output":
            return
        if self._is_copy(node):
            memory = Memory(node)
            self._copies[keys[0]].append(memory)
            self._aliases[node] = Alias(memory, None, node, None, node, 0)
            return
        first = self._memories.get(keys[0])
        shared = [*self._copies[keys[0]], *(() if first is None else (first.memory,))]
        for source, alias in inputs.items():
            if any(alias.memory is memory for memory in shared):
                self._aliases[node] = Alias(alias.memory, alias, node, source, node, alias.memory.version)
                return
        if not isinstance(self._values[node], Tensor):
            return
        known = self._memories.get(keys[0])
        if known is None:
            memory = Memory(node)
            known = self._memories[keys[0]] = Alias(memory, None, node, None, node, 0)
        elif not alike(self._values[known.made], self._values[node]):  # type: ignore[index]
            known = Alias(known.memory, known, None, None, node, 0)
        self._aliases[node] = known

    def _is_copy(self, node: fx.Node) -> bool:
        """Whether a node gives a copy where fake tensors look at its input."""
        value = self._values[node]
        return name_of(node) in _COPIES_ON_CPU and isinstance(value, Tensor) and value.device.type == "cpu"

    # ---- writing

    def _write(self, node: fx.Node, inputs: dict[fx.Node, Alias]) -> None:
        """Compute what a node writes, and put it where it belongs."""
        target = written(node)
        if not isinstance(self.value(target), Tensor):  # a number: x += 1
            self._become(node, plain_call(node))
        elif target in inputs:
            self._put(inputs[target], self._result(node, target))
            self._aliases[node] = inputs[target]
        else:
            raise TraceError(
                f"{node.name} writes to {target.name}, whose memory is not known; write to a copy (clone())"
            )

    def _result(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """What the node leaves in its target: of the target's shape and dtype."""
        name = name_of(node)
        if node.op == "call_module":
            return node
        if node.target is operator.setitem:
            return assigned(self, target, *node.args[1:])
        if name == "copy_":
            return self.fitted(node.args[1], target)
        if name in _FILLS:
            place = _FILLS[name]
            return self.fitted(0 if place is None else (*node.args, *node.kwargs.values())[place], target)
        if name == "fill_diagonal_":
            return self._with_diagonal(node, target)
        call = plain_call(node)
        flagged = call.op == node.op and call.target is node.target and "out" not in node.kwargs  # inplace=True
        value = self._become(node, call, like=target if flagged else None)
        return self.cast(value, target) if "out" in node.kwargs else self.fitted(value, target)

    def _become(self, node: fx.Node, call: Call, like: fx.Node | None = None) -> fx.Node:
        """Let a node call something else; its name stays."""
        node.op, node.target, node.args, node.kwargs = call.op, call.target, call.args, call.kwargs
        self._values[node] = self._values[like] if like is not None else self._evaluated(node)
        if "val" in node.meta:
            node.meta["val"] = self._values[node]
        return node

    def _with_diagonal(self, node: fx.Node, target: fx.Node) -> fx.Node:
        if self.value(target).dim() != 2 or len(node.args) > 2 or node.kwargs.get("wrap"):
            raise TraceError(f"{node.name}: fill_diagonal_ is known for matrices without wrap only")
        fill = node.args[1] if len(node.args) > 1 else node.kwargs["fill_value"]
        diagonal = self.emit(Call("call_function", torch.diagonal, (target,), {}))
        return self.emit(
            Call("call_function", torch.diagonal_scatter, (target, self.fitted(fill, diagonal)), {}), target
        )

    def here(self) -> str:
        """The node that is rewritten, to be shown."""
        return self._current.name if self._current is not None else "the graph"

    def fitted(self, value: Any, like: fx.Node) -> fx.Node:
        """A value of the shape and the dtype of ``like``, which it can be broadcast to."""
        if not isinstance(value, fx.Node) or not isinstance(self.value(value), Tensor):
            return self.emit(Call("call_function", torch.full_like, (like, value), {}), like)
        fitted, wanted = self.cast(value, like), self.value(like)
        while self.value(fitted).dim() > wanted.dim():  # as assignments allow: leading axes of size 1
            fitted = self.emit(Call("call_function", operator.getitem, (fitted, 0), {}))
        if [str(s) for s in self.value(fitted).shape] != [str(s) for s in wanted.shape]:
            fitted = self.emit(Call("call_method", "expand_as", (fitted, like), {}))
        return fitted

    def cast(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """A value in the dtype of ``like``."""
        dtype = self.value(like).dtype
        if self.value(value).dtype == dtype:
            return value
        return self.emit(Call("call_method", "to", (value, dtype), {}))

    def _put(self, alias: Alias, value: fx.Node) -> None:
        """Make ``value`` what ``alias`` gives, and with it what all of its memory holds."""
        memory, fresh = alias.memory, [(alias, value)]
        while alias.parent is not None:
            if alias.made is None:
                raise TraceError(f"{self.here()} writes to memory that is shared in a way that is not known")
            parent = alias.parent
            if not isinstance(self._values[parent.now], Tensor) and parent.parent is not None:
                parent = parent.parent  # what was split, not the parts
            value = undone(self, alias.made, self._now(parent), value)
            alias = parent
            fresh.append((alias, value))
        if not self._laid_out_alike(alias, value):
            value = self.emit(Call("call_method", "contiguous", (value,), {}))
        memory.now = value
        memory.version += 1
        alias.now, alias.version = value, memory.version
        for known, node in fresh:
            if known is not alias and self._laid_out_alike(known, node):  # else the view is taken again
                known.now, known.version = node, memory.version

    def _laid_out_alike(self, alias: Alias, value: fx.Node) -> bool:
        """Whether views can be taken of ``value`` as they can of what was there before."""
        before = self._values[alias.made] if alias.made is not None else None
        after = self.value(value)
        return before is None or [str(s) for s in before.stride()] == [str(s) for s in after.stride()]

    # ---- the writer of `views`

    def value(self, node: Any) -> Any:
        """What a node gives; anything else as it is."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._values:
            self._values[node] = self._evaluated(node)
        return self._values[node]

    def emit(self, call: Call, like: fx.Node | None = None) -> fx.Node:
        """A new node, which stands in the model where the node that is rewritten stood."""
        node = self.graph.create_node(call.op, call.target, call.args, call.kwargs)
        self._values[node] = self._values[like] if like is not None else self._evaluated(node)
        if self._current is not None and "nn_module_stack" in self._current.meta:
            node.meta["nn_module_stack"] = self._current.meta["nn_module_stack"]
        if self._recorded:
            node.meta["val"] = self._values[node]
        return node

    def _evaluated(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        try:
            with fake_run(self._mode):
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise TraceError(f"{self.here()} writes in place in a way that cannot be followed: {error}") from error


def _fill_empty(node: fx.Node) -> None:
    name = name_of(node)
    if name in _EMPTY and not isinstance(node.target, torch._ops.OpOverload):
        node.target = _EMPTY[name]
        if name == "empty":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}


@contextlib.contextmanager
def fake_run(mode: FakeTensorMode) -> Iterator[None]:
    """Where operations run on fake tensors whose batch size is symbolic."""
    with torch.no_grad(), enable_python_dispatcher(), mode:
        yield
