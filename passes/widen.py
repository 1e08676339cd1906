"""The widen pass: networks of one structure and of different widths get the same widths.

Where ResNet-20 stands beside a ResNet-20 of twice the width, each space of the narrow one gets as many channels as the
wide one has. The new ones do nothing: nothing writes to them, and nothing reads them, so the network computes what it
did (`fxzip.testing.padding_error`). From then on both are networks of one architecture; what is dead is told apart by
its activations, which are constant.

Spaces correspond that lie on corresponding parameters, along the same axes and in the same roles. What cannot change
its number of channels (a stream that LayerNorms read: they would take the dead channels into their means) stays as it
is, and the networks part there.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.data.batches import Inputs, with_batch_size
from fxzip.errors import FrozenSpaceWarning, WidthWarning
from fxzip.graphs import attribute, bind_inputs
from fxzip.matching import MergeMap
from fxzip.passes.align import own_tensors
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.resize import Resized, ResizeError, resize
from fxzip.passes.split.fuse import fuse_parameter, places_by_parameter
from fxzip.passes.split.split import laid_by
from fxzip.passes.verify.precision import own_precision
from fxzip.passes.verify.reference import error_of, run

_Key = frozenset[tuple[int, int, str]]


def widen(graphs: Sequence[fx.GraphModule], example: Inputs) -> list[fx.GraphModule]:
    """The graphs, those of narrow networks with dead channels so that all have the widths of the widest.

    Args:
        graphs: Traced networks; they are left as they are.
        example: Inputs of each of them.

    Warns:
        WidthWarning: A network cannot be widened; all are given back as they were.
    """
    first, *others = graphs
    partners = [_partners(first, other) for other in others]
    if not any(map(_differ_in_width, partners)):
        return list(graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenSpaceWarning)  # the merge warns of them
        specs = [analyse_graph(graph, *example) for graph in graphs]
    known = [{id(a): id(a) for pairs in partners for a, _ in pairs}, *({id(b): id(a) for a, b in p} for p in partners)]
    wanted = _widest([_keyed(*each) for each in zip(graphs, specs, known, strict=True)])
    try:
        return [_widened(*each, example) for each in zip(graphs, specs, wanted, strict=True)]
    except ResizeError as error:
        number = next(k for k, blocks in enumerate(wanted) if blocks)
        warnings.warn(
            f"the networks have different widths, and model {number} cannot be made wider by channels that do nothing: "
            f"{error}; they are merged up to where they differ",
            WidthWarning, stacklevel=5,
        )  # fmt: skip
        return list(graphs)


def _partners(left: fx.GraphModule, right: fx.GraphModule) -> list[tuple[Tensor, Tensor]]:
    """The parameters and buffers of nodes that do the same, up to where two graphs do other things."""
    return [pair for nodes in _alike(left, right) for pair in _tensors(left, right, *nodes)]


def _alike(left: fx.GraphModule, right: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    for node, peer in zip(left.graph.nodes, right.graph.nodes, strict=False):
        if node.op != peer.op:
            return
        if node.op == "call_module":
            if type(attribute(left, str(node.target))) is not type(attribute(right, str(peer.target))):
                return
        elif node.op in ("call_function", "call_method") and node.target != peer.target:
            return
        yield node, peer


def _tensors(
    left: fx.GraphModule, right: fx.GraphModule, node: fx.Node, peer: fx.Node
) -> Iterator[tuple[Tensor, Tensor]]:
    theirs = dict(own_tensors(right, peer))
    for key, tensor in own_tensors(left, node):
        other = theirs.get(key)
        if isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.dim() == other.dim():
            yield tensor, other


def _differ_in_width(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether weights differ in more than how many outputs they have, as classifiers of other classes do."""
    return any(a.shape[1:] != b.shape[1:] for a, b in pairs)


def _keyed(graph: fx.GraphModule, spec: ChannelSpec, known: Mapping[int, int]) -> dict[_Key, list[ChannelSpace]]:
    """The roots of the spaces by where these lie on parameters that all networks have."""
    state = graph.state_dict(keep_vars=True)
    found: dict[_Key, list[ChannelSpace]] = defaultdict(list)
    for space in spec.spaces:
        sites = ((known.get(id(state[site.parameter])), site.axis, site.role) for site in space.sites)
        key = frozenset((tensor, axis, role) for tensor, axis, role in sites if tensor is not None)
        if key:
            found[key].append(spec.root(space.name))
    return found


def _widest(keyed: Sequence[Mapping[_Key, list[ChannelSpace]]]) -> list[dict[str, int]]:
    """For each network the channels (or blocks) of the families that are narrower than another's, by their roots."""
    wanted: list[dict[str, int]] = [{} for _ in keyed]
    for key in keyed[0]:
        for group in zip(*(own.get(key, ()) for own in keyed), strict=False):
            most = max(root.size for root in group)
            for blocks, root in zip(wanted, group, strict=True):
                if root.size < most:
                    blocks[root.name] = most
    return wanted


def _widened(graph: fx.GraphModule, spec: ChannelSpec, blocks: dict[str, int], example: Inputs) -> fx.GraphModule:
    """A network with dead channels.

    Raises:
        ResizeError: It cannot have them.
    """
    if not blocks:
        return graph
    resized = resize(graph, spec, blocks)
    _fill(resized, graph, spec)
    if not any(parameter.is_meta for parameter in graph.parameters()):
        inputs = tuple(bind_inputs(graph, *with_batch_size(*example, 2)).values())
        error = error_of(run(graph, inputs), run(resized.module, inputs))
        if not error <= own_precision(graph).tolerance:
            raise ResizeError(f"its outputs would be off by {error:.1e}")
    return resized.module


def _fill(resized: Resized, graph: fx.GraphModule, spec: ChannelSpec) -> None:
    """Write the network's weights, its channels first and dead ones behind them."""
    maps = {old.name: _padded(old.size, new.size) for old, new in zip(spec.spaces, resized.spec.spaces, strict=True)}
    found = places_by_parameter(spec, maps, laid_by(resized))
    old, new = graph.state_dict(keep_vars=True), resized.module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, places in found.items():
            new[name].copy_(fuse_parameter([old[name]], places))


def _padded(size: int, wider: int) -> MergeMap:
    """The map of channels that stay, before others that are made of none."""
    if size == wider:
        return MergeMap.from_assignment(range(size), 1)
    merge = torch.eye(wider, size, dtype=torch.float64)
    return MergeMap(1, None, (merge, merge.T.clone()))
