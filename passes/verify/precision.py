"""What checks are computed in: float64 where memory holds the network so, else the network's own dtype."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, fx

from fxzip.passes.verify.chance import hold_still

TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-3, torch.float16: 1e-1, torch.bfloat16: 3e-1}
"""How far two orders of the same sums may be apart, through all layers, as a share of the outputs' largest value."""
COPIES = 3
"""Networks that a check holds beside the user's: one to compare with, its permuted copy, and what is merged of both."""
CHANGE = 0.05
"""By how much parameters and statistics are changed, as a share of their size."""
PERIOD = 65_521
"""How many random numbers are drawn for one parameter: a prime, so that the rows of no matrix begin alike."""
SMALLEST = 1e-2
"""What is added to a parameter of zeros."""


@dataclass(frozen=True)
class Precision:
    """A dtype to compute in; None for the network's own."""

    dtype: torch.dtype | None
    tolerance: float

    def __str__(self) -> str:
        return "its own dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def cast(self, value: Any) -> Any:
        """An input in this dtype."""
        wide = isinstance(value, Tensor) and value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if wide else value

    def copied(self, module: fx.GraphModule) -> fx.GraphModule:
        """A copy of a network in this dtype, on which nothing depends, and which draws no random numbers."""
        copied = copy.deepcopy(module).eval()
        hold_still(copied)
        if self.dtype is None:
            return copied
        own = {p.dtype for p in module.parameters() if p.is_floating_point()}
        for node in copied.graph.nodes:  # what is joined at a start is joined in the dtype that was traced
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype in own:
                node.meta["val"] = value.to(self.dtype)
        return copied.to(self.dtype)

    def changed(self, module: fx.GraphModule, generator: Generator) -> fx.GraphModule:
        """A copy whose parameters and statistics are changed by some per cent."""
        copied = self.copied(module)
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.is_floating_point():
                    size = parameter.square().mean().sqrt().clamp(min=SMALLEST / CHANGE) * CHANGE
                    parameter.add_(_noise(parameter, generator) * size)
            for buffer in copied.buffers():
                if buffer.is_floating_point():
                    buffer.mul_(1 + CHANGE * _noise(buffer, generator).clamp(-2, 2))
        return copied


def _noise(like: Tensor, generator: Generator) -> Tensor:
    """Random numbers of a shape; large ones repeat themselves, after so many that no two channels get the same."""
    count = like.numel()
    drawn = torch.randn(min(count, PERIOD), generator=generator).to(like.device, like.dtype)
    return drawn.repeat(-(-count // PERIOD))[:count].reshape(like.shape)


def precision_for(module: fx.GraphModule) -> Precision:
    """float64 where a few copies of the network in it take at most half of what memory is free."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    kinds = {t.dtype for t in tensors}
    device = next((t.device for t in tensors), torch.device("cpu"))
    need = COPIES * 8 * sum(t.numel() for t in tensors)
    if device.type == "mps" or need > _free_memory(device) / 2 or kinds & {torch.complex64, torch.complex128}:
        return own_precision(module)
    return Precision(torch.float64, TOLERANCES[torch.float64])


def own_precision(module: fx.GraphModule) -> Precision:
    """The dtype that a network has."""
    kinds = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    loosest = max((TOLERANCES.get(kind, 1e-1) for kind in kinds), default=TOLERANCES[torch.float32])
    return Precision(None, loosest)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        return 2**32
