"""Fingerprints of networks: whether the weights are those that something was found from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.errors import ProcessError
from fxzip.processes import Processes


def fingerprint(model: nn.Module) -> str:
    """A checksum of a network's parameters and buffers, by name; those on the meta device have none."""
    mark = 0
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        mark = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), mark)
        if not tensor.is_meta:
            mark = marked(tensor, mark)
    return f"{mark:08x}"


def marked(tensor: Tensor, mark: int = 0) -> int:
    """A checksum of a tensor's bits, of whatever dtype, after what was marked before."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data, mark)


def check_same(processes: Processes, models: Sequence[nn.Module]) -> None:
    """Raise where the processes were not given the same networks.

    Raises:
        ProcessError: They were not; the message names the process and the model.
    """
    if processes.count == 1:
        return
    marks = processes.everywhere("the models", [fingerprint(model) for model in models])
    for rank, own in enumerate(marks):
        if len(own) != len(marks[0]):
            raise ProcessError(f"process {rank} was given {len(own)} models, process 0 {len(marks[0])}")
        wrong = [k for k, mark in enumerate(own) if mark != marks[0][k]]
        if wrong:
            raise ProcessError(
                f"model {wrong[0]} of process {rank} has other weights than that of process 0: load the same "
                "checkpoints in each process"
            )


def run_of(models: Sequence[nn.Module], names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, str]:
    """What a merge depends on beside its images, in words (`fxzip.journal`)."""
    from fxzip import __version__

    left = {"progress"}
    shown = {f"{name}": repr(value) for name, value in settings.items() if name not in left and value is not None}
    weights = {f"the weights of {name}": fingerprint(model) for name, model in zip(names, models, strict=True)}
    return {"fxzip": __version__, **weights, **shown}
