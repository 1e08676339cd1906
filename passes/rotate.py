"""Rotate: turn the channels of all linear spaces of a network by orthogonal maps, which leaves its function as it is.

This is the oracle of `fxzip.passes.linearity`, as `permute` is that of the analysis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, fx

from fxzip.channels import ChannelSpace, ChannelSpec, Site


def random_rotations(spec: ChannelSpec, generator: Generator | None = None) -> dict[str, Tensor]:
    """For each linear space a random orthogonal map, (size, size) float64, that lets no channel leave its block."""
    return {space.name: _rotation(space, generator) for space in spec.spaces if space.linear}


def _rotation(space: ChannelSpace, generator: Generator | None) -> Tensor:
    if space.block is None:
        return _orthogonal(space.size, generator)
    blocks = [_orthogonal(count, generator) for count in space.block.bincount().tolist() if count]
    found: Tensor = torch.block_diag(*blocks)
    return found


def _orthogonal(n: int, generator: Generator | None) -> Tensor:
    found: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return found


def rotate(spec: ChannelSpec, module: fx.GraphModule, maps: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of a network with the channels of some spaces turned.

    Args:
        spec: The network's channel spaces, as `linearise` gives them: norms have no scales.
        module: The network; its parameters have the names that the sites give.
        maps: For each space an orthogonal matrix, (size, size).
    """
    module = copy.deepcopy(module)
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, matrix in maps.items():
            for site in spec[name].sites:
                tensor = state[site.parameter]
                tensor.copy_(turned(tensor, site, matrix.to(tensor)))
    return module


def turned(tensor: Tensor, site: Site, matrix: Tensor) -> Tensor:
    """A parameter with a matrix (size, size) applied to the channels at a site, to each copy of them by itself.

    Orthogonal maps are the same where channels are produced and where they are contracted: (W Qᵀ)ᵀ = Q Wᵀ.
    """
    index = site.index.to(tensor.device)
    first = tensor.movedim(site.axis, 0).clone()
    first[index] = torch.tensordot(matrix, first[index], 1)
    return first.movedim(0, site.axis)
