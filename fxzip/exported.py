"""What an exported file looks like from outside: the names of its tensors, and running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs
from fxzip.graphs import placeholders

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def input_names(zipped: ZippedModel, example: Inputs) -> tuple[str, ...]:
    """A name for each input tensor: that of the forward's argument, with the place inside it."""
    return tuple(name for key, value in named_inputs(zipped, example).items() for name in _leaf_names(key, value))


def named_inputs(zipped: ZippedModel, example: Inputs) -> dict[str, Any]:
    """The inputs by the names of the forward's arguments, those by position first."""
    args, kwargs = example
    own = [str(node.target) for node in placeholders(zipped.trunk)]
    return {**dict(zip(own, args, strict=False)), **kwargs}


def output_names(zipped: ZippedModel, task: str | None, outputs: Any) -> tuple[str, ...]:
    """A name for each output tensor: the task's, with the place inside its output."""
    pairs = zip(zipped.names, outputs, strict=True) if task is None else [(task, outputs)]
    return tuple(name for key, value in pairs for name in _leaf_names(key, value))


def _leaf_names(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaf_names(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _leaf_names(f"{name}_{number}", part)


def onnx_runner(path: Path, inputs: list[str], outputs: list[str]) -> Callable[..., list[Tensor]]:
    """A function that runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        tensors = [tensor.detach().cpu().numpy() for tensor in tensors_in((args, kwargs))]
        given = dict(zip(inputs, tensors, strict=True))
        # An input that the network does not use is none of the file's.
        known = {value.name for value in session.get_inputs()}
        found = session.run(outputs, {name: value for name, value in given.items() if name in known})
        return [torch.from_numpy(value) for value in found]

    return run
