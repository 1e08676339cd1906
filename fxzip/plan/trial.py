"""A trial of a network on tensors without memory: how much it would take, before anything takes it.

A plan may ask for a tensor of any size (``zeros(10**12)``, ``x.repeat(10**6)``) or a number of any length
(``10 ** 10 ** 10``). So trunk and heads are run once on the meta device, on the example's shapes, and no operation may
make more, and no more may be needed at once, than `ALLOWED` bytes and `FACTOR` times what weights and example have.
For other inputs a network takes what it takes: like any program, in proportion to what it is given, or faster.
"""

from __future__ import annotations

import copy
import math
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
from fxzip.plan.values import DEVICE, words

ALLOWED = 4 << 30
FACTOR = 32
MOST_PIECES = 1 << 16
"""The most tensors that one operation may give."""

_MOST = 1 << 63
_GROWING = frozenset(
    words("""
arange broadcast_to constant_pad_nd expand eye full interpolate linspace new_full new_ones new_zeros normal one_hot
ones pad rand randint randn randperm repeat repeat_interleave tile tril_indices triu_indices upsample zeros
""")
)
_SPLITS = frozenset(words("chunk dsplit hsplit split split_with_sizes tensor_split unbind vsplit"))
_COMPARISONS = frozenset(words("eq ge getitem gt le lt ne not_ __len__ len size dim numel"))


class _Unknown:
    """A value that depends on inputs of which no example is known."""

    def __repr__(self) -> str:
        return "an unknown value"


_UNKNOWN = _Unknown()


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
            parts = [_UNKNOWN] * wanted if isinstance(crossing, _Unknown) else list(crossing)
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
        return [_UNKNOWN] * len(nodes)
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
            _check_call(_name(n), args, leaves)
        if any(isinstance(leaf, _Unknown) for leaf in leaves):
            return _UNKNOWN
        try:
            result = super().run_node(n)
        except (NotImplementedError, RuntimeError) as error:
            result = _largest(_name(n), args, error)
        for leaf in pytree.tree_leaves(result):
            _check_number(leaf)
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


# ---- what Python itself would compute


def _check_call(name: str, args: tuple[Any, ...], leaves: list[Any]) -> None:
    """Refuse, before it is run, what takes long or much without a tensor, and tensors in too many pieces."""
    plain = name.strip("_")
    if isinstance(args[0] if args else None, (str, dict)) and plain not in _COMPARISONS:
        raise FileFormatError(f"it calls {name} on a text or a dict, which a saved graph may not")
    if plain in ("mul", "imul", "rmul", "pow", "rpow", "ipow", "lshift") and not any(
        isinstance(leaf, (Tensor, _Unknown)) for leaf in leaves
    ):
        _check_arithmetic(plain, args)
    if plain in ("div", "divide") and "trunc" in leaves and not any(map(_is_fractional, leaves)):
        raise FileFormatError(
            f"{name} of whole numbers with rounding_mode='trunc' stops the process where it overflows: use 'floor'"
        )
    if plain in _GROWING and any(isinstance(leaf, _Unknown) for leaf in leaves):
        sizes = [abs(leaf) for leaf in leaves if type(leaf) is int and leaf]
        if math.prod(sizes) > 1 << 31:
            raise FileFormatError(f"{name} makes a tensor of at least {math.prod(sizes):,} times its input's size")
    if plain in _SPLITS and args and isinstance(args[0], Tensor):
        pieces = max((1, *args[0].shape))
        if plain == "split" and len(args) > 1 and isinstance(args[1], int):
            pieces //= max(args[1], 1)
        if pieces > MOST_PIECES and not (plain in ("chunk", "tensor_split") and leaves[1] in range(MOST_PIECES)):
            raise FileFormatError(f"{name} may give {pieces:,} tensors, more than {MOST_PIECES:,}")


def _is_fractional(value: Any) -> bool:
    """Whether a division by or of a value is not one of whole numbers, as far as is known."""
    return isinstance(value, (float, _Unknown)) or (isinstance(value, Tensor) and value.is_floating_point())


def _check_arithmetic(name: str, args: tuple[Any, ...]) -> None:
    """Powers, shifts and repeated lists."""
    left, right = (*args, 0, 0)[:2]
    if name.startswith("r"):
        left, right = right, left
    if isinstance(left, (list, tuple)) or isinstance(right, (list, tuple)):
        parts, count = (left, right) if isinstance(left, (list, tuple)) else (right, left)
        if not isinstance(count, int) or len(parts) * count > MOST_PIECES:
            raise FileFormatError(f"it repeats a list {count} times")
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and name in ("pow", "ipow") and abs(left) > 1 and right * math.log2(abs(left)) > 63:
        raise FileFormatError(f"{left} to the power of {right} does not fit into 64 bits")
    if whole and name == "lshift" and right > 63:
        raise FileFormatError(f"{left} shifted by {right} does not fit into 64 bits")


def _check_number(value: Any) -> None:
    if isinstance(value, int) and not -_MOST <= value < _MOST:
        raise FileFormatError("it gives a number that does not fit into 64 bits")
    if isinstance(value, str) and len(value) > MOST_PIECES:
        raise FileFormatError("it gives a text that is too long")


# ---- sizes that depend on values


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
