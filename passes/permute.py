"""Permute: move the channels of all spaces of a network, which leaves its function as it is.

This is the oracle of the analysis: a space with a site too few, a site too many or channels in the wrong order
changes the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from fxzip.channels import ChannelSpec, Site
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace.trace import trace


def random_permutations(spec: ChannelSpec, generator: Generator | None = None) -> dict[str, Tensor]:
    """For each space a random order of its channels that keeps blocks whole; (size,) source channels by name."""
    found: dict[str, Tensor] = {}
    for space in spec.by_depth:
        if space.parent is None or space.block is None:
            found[space.name] = _cycle(space.size, generator)
            continue
        width = space.size // len(found[space.parent])
        inner = torch.stack([_cycle(width, generator) for _ in found[space.parent]])
        found[space.name] = (found[space.parent][:, None] * width + inner).reshape(-1)
    return found


def _cycle(n: int, generator: Generator | None) -> Tensor:
    """A random order of n channels that is one cycle, so that it respects no part of them by chance."""
    visit = torch.randperm(n, generator=generator)
    order = torch.empty_like(visit)
    order[visit] = visit.roll(1)
    return order


def permuted(spec: ChannelSpec, model: nn.Module, generator: Generator | None = None) -> nn.Module:
    """A copy of a network with all its spaces permuted at random; traced again if its weights must be folded."""
    orders = random_permutations(spec, generator)
    state = model.state_dict()
    known = all(site.parameter in state for space in spec.spaces for site in space.sites)
    if known and not spec.folded and not isinstance(model, nn.DataParallel):
        return permute(spec, model, orders)
    args, kwargs = spec.example
    return permute(spec, canonicalise(trace(model, args, kwargs)), orders)


def permute(spec: ChannelSpec, model: nn.Module, orders: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with its channels in another order.

    Args:
        spec: The network's channel spaces.
        model: The network; its parameters have the names that the sites give.
        orders: For each space the source channel of each new channel, (size,).

    Raises:
        KeyError: The network has no parameter of a site's name.
    """
    model = _fresh_copy(model)
    state = model.state_dict(keep_vars=True)
    sites = [(site, orders[space.name]) for space in spec.spaces for site in space.sites]
    with torch.no_grad():
        for site, order in sites:
            if site.rows is None:
                tensor = state[site.parameter]
                index = site.index.to(tensor.device)
                tensor.copy_(_arranged(tensor, site.axis, index, index[order.to(tensor.device)]))
        inside = [(site, order) for site, order in sites if site.rows is not None]
        before = {site.parameter: state[site.parameter].clone() for site, _ in inside}
        for site, order in inside:
            _move_in_rows(before[site.parameter], state[site.parameter], site, order)
    return model


def _fresh_copy(model: nn.Module) -> nn.Module:
    """A copy in the same modes; what some models (LeViT) keep of their parameters from earlier runs is cleared."""
    copied = copy.deepcopy(model)
    copied.train()
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        new.training = old.training
    return copied


def _move_in_rows(before: Tensor, tensor: Tensor, site: Site, order: Tensor) -> None:
    """Move one site's channels in the rows of each block; where one space's lie, another's may have lain before."""
    assert site.rows is not None
    width = len(site.index) // len(site.rows)
    for block, rows in enumerate(site.rows.to(tensor.device)):
        here = slice(block * width, (block + 1) * width)
        places, sources = (index.reshape(-1).to(tensor.device) for index in (site.index[here], site.index[order[here]]))
        tensor[rows] = tensor[rows].index_copy(site.axis, places, before[rows].index_select(site.axis, sources))


def _arranged(tensor: Tensor, axis: int, places: Tensor, sources: Tensor) -> Tensor:
    """The tensor with what lies at ``sources`` of an axis at ``places``; the rest where it was."""
    whole = torch.arange(tensor.shape[axis], device=tensor.device)
    whole[places.reshape(-1)] = sources.reshape(-1)
    return tensor.index_select(axis, whole)
