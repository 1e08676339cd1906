"""How two nodes, modules or constants differ, in words; None where they agree."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.graphs import attribute

# Settings of a module on which its output in eval mode does not depend.
_NO_MATTER = {"training", "inplace", "momentum", "forward"}


def same(left: Any, right: Any) -> bool:
    """Whether two plain values are equal; a device is where a model happens to be."""
    if isinstance(left, torch.device) and isinstance(right, torch.device):
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and left != left:
        return bool(right != right)
    return bool(left == right)


def own_tensors(module: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, Tensor]]:
    """A node's own parameters and buffers, by their names inside its module ("" for a get_attr node)."""
    if node.op == "get_attr":
        yield "", attribute(module, str(node.target))
    elif node.op == "call_module":
        owner: nn.Module = attribute(module, str(node.target))
        yield from owner.named_parameters(remove_duplicate=False)
        yield from owner.named_buffers(remove_duplicate=False)


def module_difference(left: nn.Module, right: nn.Module) -> str | None:
    """How two modules differ in kind, in settings that shape what they give, or in their tensors."""
    if type(left) is not type(right):
        return "they are different kinds of module"
    ours, theirs = dict(_settings(left)), dict(_settings(right))
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or not _same_setting(ours[key], theirs[key]):
            return f"{key} is {_word(ours.get(key))} in one and {_word(theirs.get(key))} in the other"
    return _tensors_difference(_own(left), _own(right))


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _tensors_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> str | None:
    if left.keys() != right.keys():
        return f"only one of them has {', '.join(sorted(left.keys() ^ right.keys()))}"
    for key, tensor in left.items():
        reason = _tensor_difference(tensor, right[key])
        if reason:
            return f"{key} {reason}".strip()
    return None


def _tensor_difference(left: Tensor, right: Tensor) -> str | None:
    if left.shape != right.shape:
        return f"has shape {tuple(left.shape)} in one and {tuple(right.shape)} in the other"
    if left.dtype != right.dtype:
        return f"is {left.dtype} in one and {right.dtype} in the other"
    return None


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's plain public attributes, and those of its parts: strides, epsilons, activations by name."""
    for prefix, part in module.named_modules():
        yield f"{prefix}.type" if prefix else "type", type(part)
        for key, value in part.__dict__.items():
            if not key.startswith("_") and key not in _NO_MATTER and not isinstance(value, (Tensor, nn.Module)):
                yield f"{prefix}.{key}" if prefix else key, value


def _same_setting(left: Any, right: Any) -> bool:
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(_same_setting(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, types.FunctionType) and isinstance(right, types.FunctionType):
        return left.__qualname__ == right.__qualname__ and left.__module__ == right.__module__
    plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, type)
    if isinstance(left, plain) or isinstance(right, plain):
        return same(left, right)
    return type(left) is type(right)  # nothing that shapes an output of torch.nn's modules


def _word(value: Any) -> str:
    return value.__name__ if isinstance(value, (type, types.FunctionType)) else repr(value)


def constant_difference(
    left: fx.GraphModule, left_node: fx.Node, right: fx.GraphModule, right_node: fx.Node
) -> str | None:
    """Shape and dtype; and the values, where they are no parameters but settings."""
    ours, theirs = attribute(left, str(left_node.target)), attribute(right, str(right_node.target))
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return None if same(ours, theirs) else "their values differ"
    if isinstance(ours, nn.Parameter) != isinstance(theirs, nn.Parameter):
        return "one is a parameter and the other is not"
    reason = _tensor_difference(ours, theirs)
    if reason:
        return f"it {reason}"
    fixed = not ours.is_floating_point() or _is_transient(left, left_node) or _is_transient(right, right_node)
    if fixed and not isinstance(ours, nn.Parameter) and not ours.is_meta and not theirs.is_meta:
        return None if torch.equal(ours.cpu(), theirs.cpu()) else "their values, which are constants, differ"
    return None


def _is_transient(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a tensor is not part of the state dict: made from settings, not learnt."""
    path, _, name = str(node.target).rpartition(".")
    return name not in module.get_submodule(path)._parameters and name in (
        module.get_submodule(path)._non_persistent_buffers_set
    )


def parting_sentence(modules: Sequence[fx.GraphModule], number: int, left: fx.Node, right: fx.Node, reason: str) -> str:
    """Where and why the first model and another one diverge."""
    return (
        f"model 0 and model {number} diverge at {_describe(modules[0], left)} and "
        f"{_describe(modules[number], right)}: {reason}"
    )


def _describe(module: fx.GraphModule, node: fx.Node) -> str:
    """``fc (Linear, weight 10 x 512, bias 10)``."""
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"the input {node.target}"
    kind = node.op
    if node.op == "call_module":
        kind = type(attribute(module, str(node.target))).__name__
    elif node.op == "call_function":
        kind = getattr(node.target, "__name__", str(node.target))
    elif node.op == "call_method":
        kind = f".{node.target}()"
    shapes = [f"{key} {_shape(tensor)}".strip() for key, tensor in own_tensors(module, node)]
    name = str(node.target) if node.op in {"call_module", "get_attr"} else node.name
    value = node.meta.get("val")
    gives = [f"output {_shape(value)}"] if isinstance(value, Tensor) and not shapes else []
    return f"{name} ({', '.join([kind, *shapes, *gives])})"


def _shape(tensor: Tensor) -> str:
    return " x ".join("batch" if isinstance(n, torch.SymInt) else str(n) for n in tensor.shape) or "scalar"
