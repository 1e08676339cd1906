"""Weave: one network's graph up to a spot, a linear map, and another network's graph from there on.

The map is a 1×1 convolution, or a linear layer where channels come last, and begins as zeros: it is solved for as any
layer is (`fxzip.passes.refit`), and so are the layers behind it. A map is brought to the other network's grid before,
by the mean of the positions that come together, or by bilinear interpolation. Stitching of networks is due to Lenc and
Vedaldi (arXiv 1411.5908); Bansal, Nakkiran and Barak (arXiv 2106.07682) compare what networks learn by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxzip.data.loops import device_of
from fxzip.graphs import free_name, learned, placeholders
from fxzip.passes.refit.layers import ANEW
from fxzip.passes.split.parts import part
from fxzip.passes.split.stems import JOINED, STEM
from fxzip.passes.stitch.spots import Spot

NAME = "stitch"
"""The module of the map."""
_MAPS: Mapping[int, Callable[..., nn.Module]] = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
"""By the number of axes of a tensor with its channels first, without the batch."""


def weave(models: tuple[fx.GraphModule, ...], trunk: Spot, rest: Spot) -> fx.GraphModule:
    """The second network's rest behind the first one's beginning, with a map of zeros between them.

    What comes from the first network is marked as a stem, which no fit changes.

    Args:
        models: The networks; they are left as they are.
        trunk: Where the one that begins is left.
        rest: Where the other one goes on.
    """
    first, second = models[trunk.model], models[rest.model]
    graph, prefix, taken = fx.Graph(), free_name(STEM, dir(second)), {node.name for node in second.graph.nodes}
    copies: dict[fx.Node, fx.Node] = {node: graph.node_copy(node) for node in placeholders(second)}
    stem = dict(zip(placeholders(first), copies.values(), strict=True))
    for node in list(first.graph.nodes)[: trunk.end]:
        if node not in stem:
            stem[node] = _of_stem(graph, node, prefix, stem, taken)
    copies[rest.node] = _seam(graph, stem[trunk.node], trunk, rest, free_name(NAME, dir(second)), taken)
    own = learned(second)
    for place, node in enumerate(second.graph.nodes):
        if node not in copies and (place >= rest.end or node in own):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    root = copy.copy(second)
    root.add_module(prefix, first)
    root.add_module(str(copies[rest.node].target), _map(trunk, rest).to(device_of(second), rest.dtype))
    return part(root, graph, "Stitched")


def head_of(woven: fx.GraphModule, source: Spot) -> fx.GraphModule:
    """The part of a woven network behind its stem, as a head; its input is what crosses there."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in woven.graph.nodes:
        if node.meta.get(STEM, JOINED) != JOINED or node.op == "placeholder":
            continue
        for given in node.all_input_nodes:
            if given not in copies:  # the stem's last node
                taken = {each.name for each in woven.graph.nodes}
                copies[given] = graph.placeholder(free_name(f"trunk_{source.node.name}", taken))
                copies[given].meta = dict(given.meta)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return part(woven, graph, "Head")


def _of_stem(graph: fx.Graph, node: fx.Node, prefix: str, stem: Mapping[fx.Node, fx.Node], taken: set[str]) -> fx.Node:
    target: Any = node.target
    if node.op in ("call_module", "get_attr"):
        target = f"{prefix}.{node.target}"
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), stem.__getitem__)
    new = graph.create_node(node.op, target, args, kwargs, name=free_name(f"{STEM}_{node.name}", taken))
    new.meta = {**node.meta, STEM: 0}
    return new


def _seam(graph: fx.Graph, value: fx.Node, trunk: Spot, rest: Spot, target: str, taken: set[str]) -> fx.Node:
    """From one network's tensor to the other's: moved, resampled, mapped; the last node has the other's name."""

    def step(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        given: fx.Node = args[0]
        name = free_name(f"{NAME}_{function.__name__}", taken | {node.name for node in graph.nodes})
        node = graph.create_node("call_function", function, args, kwargs, name=name)
        node.meta = {STEM: JOINED, "val": function(given.meta["val"], *args[1:], **kwargs)}
        return node

    if trunk.grid != rest.grid:
        if trunk.axis != 1:
            value = step(torch.movedim, value, trunk.axis, 1)
        value = _resampled(step, value, trunk.grid, rest.grid)
        now = 1
    else:
        now = trunk.axis
    if now != rest.axis:
        value = step(torch.movedim, value, now, rest.axis)
    layer = graph.create_node("call_module", target, (value,), name=rest.node.name)
    layer.meta = {"val": rest.node.meta["val"], ANEW: True}
    return layer


def _resampled(step: Callable[..., fx.Node], value: fx.Node, has: tuple[int, ...], wants: tuple[int, ...]) -> fx.Node:
    """A map (batch, channels, height, width) on another grid."""
    if all(a % b == 0 for a, b in zip(has, wants, strict=True)):
        size = [a // b for a, b in zip(has, wants, strict=True)]
        return step(F.avg_pool2d, value, size)
    return step(F.interpolate, value, size=list(wants), mode="bilinear")


def _map(trunk: Spot, rest: Spot) -> nn.Module:
    """A linear map of channels, of zeros."""
    if rest.axis == len(rest.shape):
        layer: nn.Module = nn.Linear(trunk.channels, rest.channels)
    else:
        layer = _MAPS[len(rest.shape)](trunk.channels, rest.channels, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer.requires_grad_(False)


def fits(trunk: Spot, rest: Spot) -> bool:
    """Whether one tensor can be mapped onto the other: positions are the same, or both are grids of two axes."""
    return trunk.dtype == rest.dtype and (trunk.grid == rest.grid or len(trunk.grid) == len(rest.grid) == 2)


def operations(trunk: Spot, rest: Spot) -> int:
    """What the map costs on one example, in floating-point operations."""
    return int(2 * trunk.channels * torch.Size(rest.shape).numel())
