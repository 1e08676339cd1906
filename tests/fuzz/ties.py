"""Whether matching can tell a network's channels apart: none of them dead, no two of them alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxzip.channels import ChannelSpec
from tests.oracles import recorded


def tied_spaces(module: fx.GraphModule, spec: ChannelSpec, inputs: tuple[Any, ...]) -> list[str]:
    """The spaces that have, somewhere in the graph, dead channels or two that are alike on these inputs."""
    values = recorded(module, *inputs)
    found = set()
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for space, axes, index in spec.locate(name):
            samples = _samples(value, axes, index)
            if space.size > 1 and _tied(samples):
                found.add(space.name)
    return sorted(found)


def _samples(value: Tensor, axes: tuple[int, ...], index: Tensor) -> Tensor:
    """(channels, samples) of a value in which channels lie along these axes."""
    moved = value.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :])
    return flat[index].reshape(len(index), -1)


def _tied(samples: Tensor) -> bool:
    if bool((samples.std(1) <= 1e-6 * samples.std()).any()):
        return True
    correlation = torch.corrcoef(samples) - torch.eye(len(samples), dtype=samples.dtype)
    return bool((correlation > 1 - 1e-4).any())
