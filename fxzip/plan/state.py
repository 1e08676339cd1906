"""The tensors of a network as they go to a file: each once, dense, and what is to be known of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.errors import FileFormatError, SaveError
from fxzip.plan.graphs import tensors_of


def write_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to save, and what the plan says of them.

    Returns:
        Tensors on the CPU by name, and a dict of ``tied`` (a tensor's name: the one that it is saved under),
        ``order`` (name: its axes from the outermost in memory, where that is not how they are counted) and
        ``fixed`` (names of the parameters that take no gradients).

    Raises:
        SaveError: A tensor has no values, or is of a kind that no file can hold.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    order: dict[str, list[int]] = {}
    fixed: list[str] = []
    for name, tensor in tensors_of(module).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            fixed.append(name)
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise SaveError(f"the tensor {name} cannot be saved: it is sparse, quantised or has no values")
        axes = _memory_order(tensor)
        if axes != sorted(axes):
            order[name] = axes
        # A copy of its own: a file format of plain tensors cannot hold two views of the same memory.
        tensors[name] = tensor.detach().permute(axes).cpu().clone(memory_format=torch.contiguous_format)
    return tensors, {"tied": tied, "order": order, "fixed": fixed}


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes from the outermost in memory to the innermost; as counted where the memory is not dense."""
    steps = tensor.stride()
    axes = sorted(range(tensor.dim()), key=lambda axis: (-steps[axis], axis))
    dense = tensor.permute(axes).is_contiguous() and not tensor.is_contiguous()
    return axes if dense else list(range(tensor.dim()))


def read_state(module: nn.Module, tensors: Mapping[str, Tensor], notes: Any) -> None:
    """Give a network, which is on the meta device, its tensors.

    Args:
        module: The network; it is changed.
        tensors: What was saved.
        notes: What the plan says of them.

    Raises:
        FileFormatError: The tensors are not those of the network.
    """
    tied, order, fixed = _checked_notes(notes)
    names = tensors_of(module)
    given = set(tensors) | set(tied)
    twice = set(tensors) & set(tied)
    if given != set(names) or twice:
        wrong = ", ".join(sorted(twice | given ^ set(names))[:3])
        raise FileFormatError(f"the tensors are not those of the graph: {wrong}")
    made: dict[str, Tensor] = {}
    for name, old in names.items():
        if name in tied:
            continue
        made[name] = _made(name, old, tensors[name], order.get(name), name not in fixed)
        _put(module, name, made[name])
    for name, other in tied.items():
        if other not in made or isinstance(names[name], nn.Parameter) != isinstance(made[other], nn.Parameter):
            raise FileFormatError(f"the tensor {name} cannot be tied to {other!r}")
        _put(module, name, made[other])


def _checked_notes(notes: Any) -> tuple[dict[str, str], dict[str, list[int]], set[str]]:
    kinds = {"tied": dict, "order": dict, "fixed": list}
    if not isinstance(notes, dict) or not all(isinstance(notes.get(key), kind) for key, kind in kinds.items()):
        raise FileFormatError("the notes on the tensors are incomplete")
    if not all(isinstance(name, str) for name in (*notes["tied"].values(), *notes["fixed"])):
        raise FileFormatError("the notes on the tensors are not a list of names")
    return notes["tied"], notes["order"], set(notes["fixed"])


def _made(name: str, old: Tensor, saved: Tensor, axes: Any, learns: bool) -> Tensor:
    """One tensor, in memory as it was, checked against the layer that it goes to."""
    # A copy: what is read may lie in the file's own memory, where its address is not as torch would align it.
    tensor = saved.clone()
    if axes is not None:
        if not isinstance(axes, list) or sorted(map(str, axes)) != sorted(map(str, range(saved.dim()))):
            raise FileFormatError(f"the order of the axes of {name} is {axes!r}")
        tensor = tensor.permute([axes.index(axis) for axis in range(saved.dim())])
    unknown = old.dim() == 1 and len(old) == 0
    if not unknown and (tensor.shape != old.shape or tensor.is_floating_point() != old.is_floating_point()):
        raise FileFormatError(f"the tensor {name} is of shape {list(tensor.shape)}, the layer's is {list(old.shape)}")
    if not isinstance(old, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=learns and (tensor.is_floating_point() or tensor.is_complex()))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, tensor)
