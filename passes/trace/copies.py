"""Copies of a user's model that passes may run and change: the model itself stays as it is."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxzip.errors import TraceError

_CHANGEABLE = (list, dict, set, deque, nn.Module, Tensor)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def eval_copy(model: nn.Module, shared: bool = False) -> nn.Module:
    """A copy of ``model`` in eval mode that has never run, and that runs as the model does.

    Its hooks are copies with state of their own, so that what they collect stays theirs. Parts under ``torch.compile``
    are looked through. Switching to train mode and back clears what some models (LeViT) keep from earlier runs.

    Args:
        model: The model, which stays as it is.
        shared: Let the copy use the very parameters of ``model``.

    Raises:
        TraceError: A hook refers to something that cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if shared else {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses it (weight_norm leaves one)
    copied = copy.deepcopy(model, memo)
    for name, module in copied.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in [(key, hook) for key, hook in hooks.items() if not is_torchs(hook)]:
                hooks[key] = own_function(hook, memo, f"the hook {title_of(hook)} of {name or 'the model'}")
        _look_through(name, module, memo)
    return copied.train().eval()


def has_hooks(model: nn.Module) -> bool:
    """Whether hooks that are not PyTorch's own run with the model."""
    return any(
        not is_torchs(hook)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )


def title_of(hook: object) -> str:
    """What to call a hook."""
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def is_torchs(hook: object) -> bool:
    """Whether a hook is PyTorch's own."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home == "torch" or home.startswith("torch.")


def own_function(function: Any, memo: dict[int, Any], what: str) -> Any:
    """A function with copies of all that it refers to and could change; anything else as it is.

    ``copy.deepcopy`` takes functions for values: a copy would go on appending to the user's list, and would read the
    weights of the user's model.

    Args:
        function: A function, or an object that deepcopy has copied already.
        memo: What deepcopy has copied.
        what: What to call it where it cannot be copied.

    Raises:
        TraceError: It refers to something that cannot be copied.
    """
    if not isinstance(function, types.FunctionType):
        return function

    def own(value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return value if id(value) in seen else own_function(value, memo, what)
        try:
            return copy.deepcopy(value, memo)
        except Exception as error:
            raise TraceError(
                f"{what} refers to a {type(value).__name__}, which cannot be copied ({error}), and the model's own "
                "must not be used; take the hook off (handle.remove()) if it does not change what the model computes"
            ) from error

    seen = {id(function)}
    cells = [
        types.CellType(own(cell.cell_contents)) if _is_filled(cell) else cell for cell in function.__closure__ or ()
    ]
    names = [name for name in function.__code__.co_names if isinstance(function.__globals__.get(name), _CHANGEABLE)]
    variables = {**function.__globals__, **{name: own(function.__globals__[name]) for name in names}}
    defaults = own(function.__defaults__)
    copied = types.FunctionType(function.__code__, variables, function.__name__, defaults, tuple(cells))
    copied.__kwdefaults__ = own(function.__kwdefaults__)
    return functools.update_wrapper(copied, function)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _look_through(name: str, module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a copied module run its Python, whatever was compiled."""
    if type(module).__name__ == "OptimizedModule":
        module.__dict__["forward"] = lambda *args, **kwargs: module._orig_mod(*args, **kwargs)  # type: ignore[operator]
        return
    forward = module.__dict__.get("forward")
    if forward is None:
        return
    forward = copy.deepcopy(getattr(forward, "_torchdynamo_orig_callable", forward), memo)
    if getattr(forward, "__func__", forward) is type(module).forward and getattr(forward, "__self__", module) is module:
        del module.__dict__["forward"]
    else:
        with contextlib.suppress(TraceError):  # torch.export's guards: they keep nothing of the model
            forward = own_function(forward, memo, f"the forward of {name or 'the model'}")
        module.__dict__["forward"] = forward


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Where models run as their Python says: nothing is compiled, and no autocast is on but the model's own."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes a second to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_some_values(model: nn.Module) -> nn.Module:
    """Where parameters have no values, statistics have none either: they would be on another device. Indices do."""
    if any(parameter.is_meta for parameter in model.parameters()):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    module._buffers[name] = buffer.to("meta")
    return model
