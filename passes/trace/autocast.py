"""What autocast does to a call: which of its tensors are cast before it runs, and to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxzip.errors import TraceError


class _Casts(TorchDispatchMode):
    """Notes the casts of given tensors, by their identity, and whether there were others."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = {id(tensor) for tensor in tensors}
        self.found: dict[int, torch.dtype] = {}
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is not None:
            if id(args[0]) in self._given:
                self.found[id(args[0])] = kwargs["dtype"]
            else:
                self.others = True
        return func(*args, **kwargs)


def is_on(device: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return torch.amp.is_autocast_available(device) and bool(torch.is_autocast_enabled(device))


def without_autocast(
    device: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[..., Any]
) -> Any:
    """What ``func`` gives under autocast, from the same call on tensors that are cast first.

    Args:
        device: The kind of device that autocast is on for.
        func: A function of torch.
        args: Its arguments, with fake tensors.
        kwargs: Its keyword arguments.
        call: Calls a function with args and kwargs, and records it.

    Raises:
        TraceError: Autocast casts what ``func`` computes on the way, which cannot be said from outside.
    """
    with _Casts([leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]) as casts:
        expected = func(*args, **kwargs)
    wanted = casts.found
    with torch.autocast(device, enabled=False):

        def cast(leaf: Tensor) -> Any:
            return call(Tensor.to, (leaf, wanted[id(leaf)]), {}) if id(leaf) in wanted else leaf

        args, kwargs = pytree.tree_map_only(Tensor, cast, (args, kwargs))
        result = call(func, args, kwargs)
    before, after = (
        [leaf.dtype for leaf in pytree.tree_leaves(r) if isinstance(leaf, Tensor)] for r in (expected, result)
    )
    if before != after or (casts.others and func is not Tensor.to):
        name = getattr(func, "__name__", func)
        raise TraceError(
            f"autocast inside forward changes what {name} computes on the way; take it out of the autocast"
        )
    return result
