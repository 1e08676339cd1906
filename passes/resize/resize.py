"""Resize: give a network's graph the sizes of other numbers of channels.

1. Parameters and buffers get their sizes from the sites of the spaces that change (`fxzip.passes.resize.layout`). They
   hold zeros: weights come with a merge.
2. Numbers in the graph (shapes of views, lengths of pieces, groups of convolutions, attributes of modules) follow from
   the labels along the axes that they speak of (`fxzip.rules.sizes`).
3. The graph is run on tensors without memory, and each shape is held against what the labels say.
4. It is analysed again: its spaces must be the old ones, at the same sites, of the sizes that were asked for.

What fails is an error that names the node.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpace, ChannelSpec, Site
from fxzip.errors import FrozenSpaceWarning, OptionError
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.resize.layout import Sizes
from fxzip.passes.resize.shapes import Call, check_shapes, old_shapes
from fxzip.rules import target_of
from fxzip.rules.sizing import SizeError, find_size_rule


class ResizeError(OptionError):
    """A network cannot have these sizes; it says where and why."""

    node: str = ""
    """The node, where that is known."""


@dataclass(frozen=True, eq=False)
class Resized:
    """A network of other sizes, without weights.

    Attributes:
        module: Its graph; nodes, parameters and modules have the names that they had.
        spec: Its channel spaces, those of the network that it was made from, in the same order.
        blocks: The new number of blocks of each family of spaces that changed, by its root.
    """

    module: fx.GraphModule
    spec: ChannelSpec
    blocks: Mapping[str, int]

    def site(self, space: ChannelSpace, site: Site) -> Site:
        """The site here that corresponds to one of the old network's."""
        number = next(k for k, other in enumerate(space.sites) if other is site)
        return self.spec[space.name].sites[number]


def resize(module: fx.GraphModule, spec: ChannelSpec, blocks: Mapping[str, int]) -> Resized:
    """A copy of a traced network with other numbers of channels, its parameters zeros where their sizes changed.

    Args:
        module: The network; it is left as it is.
        spec: Its channel spaces.
        blocks: The new number of channels of each space that lies in no other's blocks, by its name; those that are
            left out keep theirs. Spaces inside of its blocks grow with it.

    Raises:
        ResizeError: A number in the graph cannot follow; the message names the node and the reason.
    """
    changed = {name: count for name, count in blocks.items() if count != spec[name].size}
    sizes = Sizes(spec, changed)
    resized = copy.deepcopy(module)
    _resize_parameters(resized, sizes)
    try:
        shapes = old_shapes(module, spec)
        _rewrite(resized, sizes, shapes)
        check_shapes(resized, sizes, shapes)
        return Resized(resized, _analysed(resized, sizes), changed)
    except SizeError as error:
        failed = ResizeError(str(error))
        failed.node = error.node
        raise failed from error


def _resize_parameters(module: fx.GraphModule, sizes: Sizes) -> None:
    """Put zeros of the new sizes in the place of parameters and buffers that change; what is tied stays so."""
    sites: dict[str, list[tuple[ChannelSpace, Site]]] = defaultdict(list)
    for space in sizes.spec.spaces:
        for site in space.sites:
            sites[site.parameter].append((space, site))
    state = module.state_dict(keep_vars=True)
    new: dict[int, Tensor] = {}
    for name, own in sites.items():
        old = state[name]
        shape = sizes.of_parameter(old.shape, own)
        if shape != list(old.shape):
            zeros = torch.zeros(shape, dtype=old.dtype, device=old.device)
            kept = isinstance(old, nn.Parameter)
            new[id(old)] = nn.Parameter(zeros, requires_grad=old.requires_grad) if kept else zeros
    for name, old in state.items():
        if id(old) in new:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, new[id(old)])


def _rewrite(module: fx.GraphModule, sizes: Sizes, shapes: Mapping[str, Any]) -> None:
    """Let the numbers in the graph, and the attributes of modules, follow."""
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        target = target_of(module, node)
        rule = find_size_rule(target)
        if rule is None:
            continue
        call = Call(node, target if isinstance(target, nn.Module) else None, sizes, shapes)
        try:
            rule(call)
        except SizeError as error:
            raise SizeError(str(error), node.name) from error
        node.args, node.kwargs = tuple(call.args), call.kwargs
    module.graph.lint()
    module.recompile()


def _analysed(module: fx.GraphModule, sizes: Sizes) -> ChannelSpec:
    """The channel spaces of the resized network, in the order of the old ones.

    Raises:
        SizeError: They are others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenSpaceWarning)
        args, kwargs = sizes.spec.example
        found = analyse_graph(module, args, kwargs)
    names = {space.name for space in found.spaces}
    for space in sizes.spec.spaces:
        if space.name not in names or not _alike(space, found[space.name], sizes.of_space(space)):
            raise SizeError(f"the channels of {space.name} would be tied otherwise")
    order = {space.name: k for k, space in enumerate(sizes.spec.spaces)}
    if len(names) != len(order):
        raise SizeError("it would have other channel spaces")
    number = torch.tensor([*(order[space.name] for space in found.spaces), -1])
    layout = replace(found.layout, space=number[found.layout.space])
    return replace(found, spaces=tuple(found[name] for name in order), layout=layout)


def _alike(old: ChannelSpace, new: ChannelSpace, size: int) -> bool:
    """Whether a space of the resized network is the old one, with so many channels."""

    def key(site: Site) -> tuple[Any, ...]:
        return site.parameter, site.axis, site.role, site.index.shape[1], site.rows is None, site.statistic

    return new.size == size and new.parent == old.parent and list(map(key, old.sites)) == list(map(key, new.sites))
