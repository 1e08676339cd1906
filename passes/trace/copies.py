"""Copies of a user's model that passes may run and change: the model itself stays as it is."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn


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
    """A copy of ``model`` in eval mode that has never run.

    Hooks that are not torch's own stay behind: they are there to watch the user's model. Switching to
    train mode and back clears what some models (LeViT) keep from earlier runs.

    Args:
        model: The model, which stays as it is.
        shared: Let the copy use the very parameters of ``model``.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if shared else {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses it (weight_norm leaves one)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not _is_torchs(hook)]:
                del hooks[key]
    return copied.train().eval()


def _is_torchs(hook: object) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home == "torch" or home.startswith("torch.")


def without_some_values(model: nn.Module) -> nn.Module:
    """Where parameters have no values, statistics have none either: they would be on another device. Indices do."""
    if any(parameter.is_meta for parameter in model.parameters()):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    module._buffers[name] = buffer.to("meta")
    return model
