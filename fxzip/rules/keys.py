"""The names that rules are found under."""

from __future__ import annotations

import operator
from types import BuiltinFunctionType, MethodDescriptorType

import torch
from torch import Tensor, nn

_NATIVE = ("torch", "_operator", "math", "builtins", "einops")


def key_of(target: object) -> object:
    """What a rule for this target is found under: PyTorch's own functions go by their bare name."""
    if isinstance(target, type | nn.Module):
        return target
    if isinstance(target, str):
        return _bare(target)
    if isinstance(target, torch._ops.OpOverload):
        return _bare(target.overloadpacket.__name__)
    native = str(getattr(target, "__module__", None) or "torch").split(".")[0] in _NATIVE
    if native or isinstance(target, (BuiltinFunctionType, MethodDescriptorType)):
        return _bare(getattr(target, "__name__", str(target)))
    return target


def _bare(name: str) -> str:
    """A name without underscores; the reflected and in-place forms of an operator (``__radd__``, ``iadd``) are it."""
    bare = name.strip("_")
    if not name.startswith("__") and hasattr(torch, bare):  # torch.rand is no reflected ``and``
        return bare
    for prefix in ("r", "i"):
        if bare.startswith(prefix) and hasattr(operator, f"__{bare[1:]}__") and not hasattr(Tensor, bare):
            return bare[1:]
    return bare
