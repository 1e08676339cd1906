"""A trial of a network on tensors without memory: how much it would take, before anything takes it.

A plan may ask for a tensor of any size (``zeros(10**12)``, ``x.repeat(10**6)``) or a number of any length
(``10 ** 10 ** 10``). So trunk and heads are run once on the meta device, on the example's shapes, and no operation may
make more, and no more may be needed at once, than `ALLOWED` bytes and `FACTOR` times what weights and example have.
For other inputs a network takes what it takes: like any program, in proportion to what it is given, or faster.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxzip.data.batches import Inputs
from fxzip.errors import FileFormatError
from fxzip.plan.calls import UNKNOWN, Unknown, check_call, check_number
from fxzip.plan.values import DEVICE

ALLOWED = 4 << 30
FACTOR = 32


def check_run(
    trunk: fx.GraphModule, heads: Mapping[str, fx.GraphModule], example: Inputs | None, own: Sequence[Tensor]
) -> None:
    """Run a network on the meta device.

    Args:
        trunk: The shared part.
        heads: The others, by task; they take the tuple that the trunk gives.
        example: Inputs of the right shapes. Without, only what does not depend on inputs is run.
        own: The network's tensors: they say where it runs, in which type, and how large it is.

    Raises:
        FileFormatError: It takes too much memory, or does not run; the node is named.
    """
    args, kwargs = pytree.tree_map_only(Tensor, partial(_as_used, own=own), example or ((), {}))
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    limit = ALLOWED + FACTOR * sum(tensor.nbytes for tensor in (*own, *inputs))
    shells = {id(tensor): _shell(tensor) for tensor in own}
    with torch.no_grad(), _Watch(limit):
        crossing = _Trial(trunk, limit, shells).run(*_bound(trunk, args, kwargs, example is not None))
        for name, head in heads.items():
            wanted = len(head.graph.find_nodes(op="placeholder"))
            parts = [UNKNOWN] * wanted if isinstance(crossing, Unknown) else list(crossing)
            if len(parts) != wanted:
                raise FileFormatError(f"the head {name} takes {wanted} values, and the trunk gives {len(parts)}")
            _Trial(head, limit, shells).run(*parts)


def _as_used(tensor: Tensor, own: Sequence[Tensor]) -> Tensor:
    """An input without memory, in the network's type if it has one."""
    types = {other.dtype for other in own if other.is_floating_point()}
    dtype = next(iter(types)) if tensor.is_floating_point() and len(types) == 1 else tensor.dtype
    return _shell(tensor.to("meta", dtype))


def _shell(tensor: Tensor) -> Tensor:
    """A tensor or parameter like another, without memory."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _bound(trunk: fx.GraphModule, args: Any, kwargs: Any, known: bool) -> list[Any]:
    """A value for each placeholder."""
    nodes = trunk.graph.find_nodes(op="placeholder")
    if not known:
        return [UNKNOWN] * len(nodes)
    named = {**dict(zip((str(node.target) for node in nodes), args, strict=False)), **kwargs}
    rest = [node.args[0] if node.args else None for node in nodes]
    return [named.get(str(node.target), default) for node, default in zip(nodes, rest, strict=True)]


class _Watch(TorchDispatchMode):
    """Sees every operation, also those inside of others, and lets none make a tensor that has memory."""

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.is_meta:  # of numbers in the plan
            result = torch.empty_like(result, device="meta")
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor) and leaf.numel() * leaf.element_size() > self.limit:
                _refuse(leaf.numel() * leaf.element_size(), self.limit)
        return result


def _refuse(size: int, limit: int) -> None:
    raise FileFormatError(
        f"it takes {size / 1e9:,.1f} GB at once on the example, more than the allowed {limit / 1e9:,.1f} GB"
    )


class _Trial(fx.Interpreter):
    """Runs the nodes whose values are known, and counts the memory that is held at once."""

    def __init__(self, module: fx.GraphModule, limit: int, shells: Mapping[int, Tensor]) -> None:
        super().__init__(module)
        self.limit = limit
        self.shells = shells
        self.extra_traceback = False
        self.held: dict[fx.Node, int] = {}
        self.total = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run one node.

        Raises:
            FileFormatError: It takes too much, or does not run.
        """
        try:
            result = self._result(n)
            self.held[n] = _memory(result)
            self.total += self.held[n]
            if self.total > self.limit:
                _refuse(self.total, self.limit)
        except FileFormatError as error:
            raise FileFormatError(f"node {n.name}: {error}") from error
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise FileFormatError(f"node {n.name} does not run on the example: {text}") from error
        for node in self.user_to_last_uses.get(n, ()):
            self.total -= self.held.pop(node, 0)
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments, with the meta device for all others."""
        found = super().fetch_args_kwargs_from_env(n)
        moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only((torch.device, str), _meta_for, found)
        return moved

    def fetch_attr(self, target: str) -> Any:
        """A tensor or layer of the network, without memory."""
        return copy.deepcopy(super().fetch_attr(target), dict(self.shells))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a layer."""
        return self.fetch_attr(target)(*args, **kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method; those that only move a tensor leave it where it is."""
        return args[0] if target in ("cpu", "cuda") else super().call_method(target, args, kwargs)

    def _result(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output", "get_attr"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        leaves = pytree.tree_leaves((args, kwargs))
        if n.op != "call_module":
            check_call(_name(n), args, leaves)
        if any(isinstance(leaf, Unknown) for leaf in leaves):
            return UNKNOWN
        try:
            result = super().run_node(n)
        except (NotImplementedError, RuntimeError) as error:
            result = _largest(_name(n), args, error)
        for leaf in pytree.tree_leaves(result):
            check_number(leaf)
        return result


def _meta_for(value: torch.device | str) -> torch.device | str:
    named = isinstance(value, torch.device) or DEVICE.fullmatch(value)
    return torch.device("meta") if named else value


def _name(node: fx.Node) -> str:
    """What a node calls, without where it is from."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).removeprefix("aten::")
    return str(getattr(node.target, "__name__", node.target))


def _memory(value: Any) -> int:
    """Bytes of the memory that lies under tensors."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _largest(name: str, args: tuple[Any, ...], error: Exception) -> Any:
    """The largest result that an operation can have that does not run, as its size depends on values.

    Raises:
        Exception: ``error``, where it is another that does not run.
    """
    x = args[0] if args else None
    if name == "nonzero" and isinstance(x, Tensor):
        return x.new_zeros((x.numel(), x.dim()), dtype=torch.int64)
    if name in ("getitem", "index") and len(args) > 1 and isinstance(x, Tensor):
        places = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        return operator.getitem(x, tuple(part for place in places for part in _all_of(place)))
    if name in ("one_hot", "repeat_interleave"):
        raise FileFormatError(
            f"the size of what {name} gives depends on values: give it as a number (num_classes, output_size)"
        ) from error
    raise error


def _all_of(place: Any) -> list[Any]:
    """An index that takes as many as a mask does where all of it is true."""
    if isinstance(place, Tensor) and place.dtype is torch.bool:
        return [place.new_zeros(place.numel(), dtype=torch.int64)] * place.dim()
    return [place]
