"""The oracles of widths: a network of more channels that do nothing, or that are copies, is the network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Generator, Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.batches import given_inputs
from fxzip.matching import MergeMap
from fxzip.passes.align import align
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.cut import MergePlan
from fxzip.passes.resize import resize
from fxzip.passes.split import Split, split
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier, fixed_sizes
from fxzip.testing.outputs import call, difference, in_type


def padding_error(
    model: nn.Module, inputs: Any, *, most: float = 1.5, seed: int = 0, fixed: Collection[str] | None = None
) -> float:
    """How far a copy is off in which every space that can change has more channels, all of which are dead.

    (`fxzip.passes.verify.fixed_sizes` says which cannot.)

    Args:
        model: The network, in eval mode and float64.
        inputs: As of `permutation_error`.
        most: By how much spaces grow at the most; each grows by a random number of channels, one at the least.
        seed: Of the numbers, and of where the dead channels lie.
        fixed: The spaces that cannot change; default: they are found.

    Returns:
        The largest difference of all outputs, as a share of the output's standard deviation.

    Raises:
        TraceError: The model cannot be traced.
    """
    module, spec, inputs = _analysed(model, inputs)
    wider = _wider(module, spec, inputs, most, seed, fixed)
    parts = _merged(module, spec, wider, lambda name: _placed(spec, name, wider, seed))
    return difference(call(model, inputs), _run(parts, inputs))


def dropping_error(
    model: nn.Module, inputs: Any, *, most: float = 1.5, seed: int = 0, fixed: Collection[str] | None = None
) -> float:
    """How far a copy is off that was made wider by copies of its channels, and then as small again as it was.

    Blocks (groups of a convolution, attention heads) that are added do nothing; they are left out again as wholes.

    Args:
        model: As of `padding_error`.
        inputs: As of `padding_error`.
        most: As of `padding_error`.
        seed: Of the numbers.
        fixed: As of `padding_error`.

    Returns:
        The largest difference of all outputs, as a share of the output's standard deviation.

    Raises:
        TraceError: The model cannot be traced.
    """
    module, spec, inputs = _analysed(model, inputs)
    wider = _wider(module, spec, inputs, most, seed, fixed)
    parts = _merged(module, spec, wider, lambda name: _copied(spec, name, wider))
    large, own, _ = _analysed(parts.trunk, inputs)
    before = {name: spec[name].size for name in wider}

    def back(name: str) -> MergeMap:
        wide = _copied(spec, name, wider)
        target = wide.merge.argmax(1)  # the channel that each one is a copy of
        if bool((wide.unmerge.sum(0) > 0).all()):
            return MergeMap.from_assignment(target, 1)
        merge = wide.unmerge
        return MergeMap(1, None, (merge, merge.T.clone()))

    small = _merged(large, own, before, back)
    outer = parts.heads[0](*_run(small, inputs))
    return max(difference(call(model, inputs), _run(parts, inputs)), difference(call(model, inputs), outer))


def _analysed(model: nn.Module, inputs: Any) -> tuple[fx.GraphModule, ChannelSpec, Any]:
    inputs = in_type(inputs, torch.float64)
    args, kwargs = given_inputs(inputs)
    module = canonicalise(trace(model, args, kwargs))
    return module, analyse_graph(module, args, kwargs), inputs


def _wider(
    module: fx.GraphModule, spec: ChannelSpec, inputs: Any, most: float, seed: int, fixed: Collection[str] | None
) -> dict[str, int]:
    """More blocks for each family that can have them."""
    kept = fixed_sizes(Verifier(module, given_inputs(inputs)), spec) if fixed is None else fixed
    free = [space for space in spec.spaces if space.parent is None and space.name not in kept]
    more = (torch.rand(len(free), generator=Generator().manual_seed(seed)) * (most - 1)).tolist()
    return {s.name: min(2 * s.size, s.size + 1 + int(share * s.size)) for s, share in zip(free, more, strict=True)}


def _merged(module: fx.GraphModule, spec: ChannelSpec, blocks: dict[str, int], make: Any) -> Split:
    """The network from its inputs to its outputs, by a map for each space."""
    resized = resize(module, spec, blocks)
    alignment = align([module])
    maps = {space.name: make(space.name) for space in spec.spaces}
    return split(MergePlan(alignment, spec, maps, 0, len(alignment.shared), resized))


def _run(parts: Split, inputs: Any) -> Any:
    args, kwargs = given_inputs(inputs)
    with torch.no_grad():
        return parts.heads[0](*parts.trunk(*args, **kwargs))


def _placed(spec: ChannelSpec, name: str, blocks: dict[str, int], seed: int) -> MergeMap:
    """The map that puts a space's blocks at random places among dead ones."""
    root = spec.root(name)
    count, width = blocks.get(root.name, root.size), spec[name].size // root.size
    generator = Generator().manual_seed(seed + sum(map(ord, root.name)))
    order = torch.randperm(count, generator=generator)[: root.size]
    places = order.sort().values if root.name not in blocks else order
    merge = torch.zeros(count * width, spec[name].size, dtype=torch.float64)
    merge[_channels(places, width), torch.arange(spec[name].size)] = 1.0
    return MergeMap(1, None, (merge, merge.T.clone()))


def _copied(spec: ChannelSpec, name: str, blocks: dict[str, int]) -> MergeMap:
    """The map that adds copies of a space's channels; of blocks, such as nothing is made of."""
    root = spec.root(name)
    count, width = blocks.get(root.name, root.size), spec[name].size // root.size
    source = _channels(torch.arange(count) % root.size, width)
    merge = torch.zeros(count * width, spec[name].size, dtype=torch.float64)
    merge[torch.arange(len(source)), source] = 1.0
    unmerge = merge.T.clone()
    if root.name != name or spec.children(name):
        unmerge[:, spec[name].size :] = 0
    else:
        unmerge /= unmerge.sum(1, keepdim=True)
    return MergeMap(1, None, (merge, unmerge))


def _channels(blocks: Tensor, width: int) -> Tensor:
    """The channels of blocks."""
    return (blocks[:, None] * width + torch.arange(width)).reshape(-1)
