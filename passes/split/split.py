"""Split: one shared trunk up to the cut, and each model's own rest as a head.

A cut is a place in the shared graph, the number of nodes before it. What crosses it is passed from the trunk
to the heads, where each model's channels are found again: U is folded into the next linear layers where
nothing stands between, and is else a gather of channels that is inserted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.loops import device_of
from fxzip.matching import MergeMap
from fxzip.passes.align import Alignment
from fxzip.passes.cut import crossing, learned
from fxzip.passes.observe import writes_in_place
from fxzip.passes.split.fuse import Mixing, along_axes, applied, fuse_parameter, sites_by_parameter
from fxzip.passes.split.stems import Stems
from fxzip.passes.split.untie import parameter_uses, untie
from fxzip.passes.trace.clean import is_within
from fxzip.rules import kind_of, target_of


@dataclass(frozen=True, eq=False)
class Split:
    """Trunk and heads; a head takes what the trunk gives.

    Attributes:
        trunk: The trunk.
        heads: The heads.
        stems: The modules of the trunk that hold what is not merged (`fxzip.passes.split.stems`).
    """

    trunk: fx.GraphModule
    heads: tuple[fx.GraphModule, ...]
    stems: tuple[str, ...] = ()


def split(alignment: Alignment, spec: ChannelSpec, maps: Mapping[str, MergeMap], cut: int, start: int = 0) -> Split:
    """Build trunk and heads.

    Args:
        alignment: The traced models.
        spec: The channel spaces of the first one.
        maps: The maps of the spaces that lie in the trunk.
        cut: How many of the shared nodes the trunk has.
        start: How many of them come before anything is merged: each model keeps these as its stem.
    """
    cross = crossing(alignment, cut)
    stems = Stems(alignment, spec, maps, start)
    trunk = _trunk(alignment, stems, cut, cross)
    _write_fused(trunk, alignment, spec, maps, cut, (*stems.prefixes, *stems.joins))
    heads = tuple(_head(alignment, spec, maps, cut, cross, model) for model in range(len(alignment.modules)))
    return Split(trunk, heads, stems.prefixes)


def _trunk(alignment: Alignment, stems: Stems, cut: int, cross: Sequence[int]) -> fx.GraphModule:
    module = alignment.modules[0]
    early = {names[0] for names in alignment.shared[: stems.start]} - learned(module)
    keep = {names[0] for names in alignment.shared[:cut]} - early
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    stems.insert(graph, copies)
    for node in module.graph.nodes:
        if node.name in keep and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    by_name = {node.name: copied for node, copied in copies.items()}
    graph.output(tuple(by_name[alignment.shared[i][0]] for i in cross))
    return _module(stems.root(), graph, "Trunk")


def _module(root: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module of its own: it has copies of the parameters that the graph uses, under their old names."""
    module = fx.GraphModule(root, graph, class_name=name)
    module.graph.eliminate_dead_code()
    result = copy.deepcopy(fx.GraphModule(module, module.graph, class_name=name))
    result.graph.lint()
    return result.eval()


def _write_fused(
    trunk: fx.GraphModule,
    alignment: Alignment,
    spec: ChannelSpec,
    maps: Mapping[str, MergeMap],
    cut: int,
    unmerged: Sequence[str],
) -> None:
    """Replace the trunk's parameters and buffers by the merged ones, but for those of ``unmerged`` modules."""
    peers = paired_parameters(alignment, cut)
    states = [module.state_dict(keep_vars=True) for module in alignment.modules]
    sites = sites_by_parameter(spec, maps)
    mapped = {id(states[0][name]): found for name, found in sites.items()}
    untied = untie(trunk, spec)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in trunk.state_dict(keep_vars=True).items():
            if is_within(name, unmerged):
                continue
            if id(tensor) in done:  # a tied parameter has several names, of which one has the sites
                continue
            done.add(id(tensor))
            own = untied.get(name)
            source = name if own is None else own.source
            tensors = [state[peer] for state, peer in zip(states, peers[source], strict=True)]
            mine = mapped.get(id(tensors[0]), ())
            if own is not None:
                mine = [(replace(site, role=own.roles.get(site.axis, site.role)), found) for site, found in mine]
            tensor.copy_(fuse_parameter(tensors, mine))


def paired_parameters(alignment: Alignment, cut: int) -> dict[str, tuple[str, ...]]:
    """For each parameter and buffer of the first model's shared nodes its name in every model."""
    nodes = [{n.name: n for n in module.graph.nodes} for module in alignment.modules]
    peers: dict[str, tuple[str, ...]] = {}
    for names in alignment.shared[:cut]:
        group = [nodes[model][name] for model, name in enumerate(names)]
        targets = [str(node.target) for node in group]
        if group[0].op == "get_attr":
            peers[targets[0]] = tuple(targets)
        elif group[0].op == "call_module":
            for key in alignment.modules[0].get_submodule(targets[0]).state_dict():
                peers[f"{targets[0]}.{key}"] = tuple(f"{target}.{key}" for target in targets)
    return peers


def _head(
    alignment: Alignment,
    spec: ChannelSpec,
    maps: Mapping[str, MergeMap],
    cut: int,
    cross: Sequence[int],
    model: int,
) -> fx.GraphModule:
    module = alignment.modules[model]
    before = {names[model]: i for i, names in enumerate(alignment.shared[:cut])}
    old = {node.name: node for node in module.graph.nodes}
    graph, copies = fx.Graph(), {}
    folds: list[Fold] = []
    gathers: dict[str, Tensor] = {}
    own = learned(module)
    after = [node for node in module.graph.nodes if node.name not in before or node.name in own]
    in_place = any(writes_in_place(node, module) for node in after)
    for i in cross:
        source = old[alignment.shared[i][model]]
        copies[source] = graph.placeholder(source.name)
    for i in cross:
        source = old[alignment.shared[i][model]]
        if in_place and alignment.shared[i][0] in spec.layout.factors:  # the other heads need it as it is
            copies[source] = graph.create_node(
                "call_function", torch.clone, (copies[source],), name=f"{source.name}_own"
            )
        unmerge = Unmerge.of(spec, maps, alignment.shared[i][0], model)
        found = foldable(alignment, spec, maps, cut, i, model) if unmerge.moves else []
        if found is None:
            copies[source] = unmerge.insert(graph, copies[source], gathers)
        else:
            folds += found
    for node in after:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    device = device_of(module)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for name, how in gathers.items():
        module.register_buffer(name, how.to(device, dtype if how.is_floating_point() else how.dtype))
    head = _module(module, graph, "Head")
    for name in gathers:
        delattr(module, name)
    for fold in folds:
        fold.apply(head)
    return head


@dataclass(frozen=True, eq=False)
class Unmerge:
    """How one model's channels are found in a merged tensor, for each axis that has channels.

    Attributes:
        node: The tensor's node in the first model.
        steps: (axis, how) pairs; ``how`` is the merged position of each of the model's positions, int64 of shape
            (positions,), or where one position is found from several, U itself, (positions, positions).
    """

    node: str
    steps: tuple[tuple[int, Tensor], ...]

    @classmethod
    def of(cls, spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, model: int) -> Unmerge:
        """From the maps of the spaces that the tensor holds."""
        steps = along_axes(spec, maps, node, model, "contract").items()
        return cls(node, tuple((axis, _as_gather(matrix)) for axis, matrix in steps))

    @property
    def moves(self) -> bool:
        """Whether any channel is elsewhere than it was."""
        return any(how.dim() == 2 or not torch.equal(how, torch.arange(len(how))) for _, how in self.steps)

    def insert(self, graph: fx.Graph, node: fx.Node, buffers: dict[str, Tensor]) -> fx.Node:
        """Append the steps to a graph; indices and matrices are added to ``buffers`` under new names."""
        for axis, how in self.steps:
            name = f"unmerge_{self.node}" if len(self.steps) == 1 else f"unmerge_{self.node}_{axis}"
            buffers[name] = how

            # Names of its own: nodes of a head that have the model's names are known as the model's.
            def call(function: Any, *args: Any, called: str = name) -> fx.Node:
                return graph.create_node("call_function", function, args, name=called)

            buffer = graph.get_attr(name)
            if how.dim() == 1:
                node = call(torch.index_select, node, axis, buffer, called=f"{name}_gather")
            else:
                last = call(torch.movedim, node, axis, -1, called=f"{name}_last")
                mixed = call(F.linear, last, buffer, called=f"{name}_linear")
                node = call(torch.movedim, mixed, -1, axis, called=f"{name}_mix")
        return node


def _as_gather(matrix: Tensor) -> Tensor:
    """The position of the only 1 in each row, or the matrix where rows are anything else."""
    place = matrix.argmax(1)
    return place if torch.equal(matrix, F.one_hot(place, matrix.shape[1]).to(matrix)) else matrix


@dataclass(frozen=True, eq=False)
class Fold:
    """U folded into the columns of a linear layer or convolution: W U."""

    parameter: str
    index: Tensor
    mixing: Mixing

    def apply(self, head: fx.GraphModule) -> None:
        """Change the head's weight."""
        weight = head.get_parameter(self.parameter)
        with torch.no_grad():
            work = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight.copy_(applied(work, 1, self.index.to(weight.device), self.mixing))


_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def foldable(
    alignment: Alignment, spec: ChannelSpec, maps: Mapping[str, MergeMap], cut: int, start: int, model: int
) -> list[Fold] | None:
    """The folds that undo the merge of one crossing tensor, or None where something else uses it.

    Between the cut and the linear layers only operations that act on each channel alone may stand, and none
    where U mixes channels: what it undoes must be undone before anything that is not linear.
    """
    module = alignment.modules[model]
    first = {names[model]: names[0] for names in alignment.shared}
    old = {node.name: node for node in module.graph.nodes}
    ours = learned(module)
    pending, folds = [old[alignment.shared[start][model]]], []
    before = {names[model] for names in alignment.shared[:cut]}
    uses = parameter_uses(module, (n for n in module.graph.nodes if n.name not in before or n.name in ours))
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.name in before:
                continue
            target = target_of(module, user)
            if isinstance(target, _LINEAR) and getattr(target, "groups", 1) == 1 and uses[id(target.weight)] == 1:
                axis = len(spec.layout.factors[first[node.name]][0].shape) - 1 if isinstance(target, nn.Linear) else 1
                found = _folds(spec, maps, first[node.name], f"{user.target}.weight", axis, model)
                if found is None:
                    return None
                folds += found
            elif (
                user.name in first
                and not _mixes(spec, maps, first[node.name])
                and user.op != "output"
                and kind_of(target) in ("passive", "pointwise")
                and (len(user.all_input_nodes) == 1 and _same_spaces(spec, first[node.name], first[user.name]))
            ):
                pending.append(user)
            else:
                return None
    return folds


def _mixes(spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str) -> bool:
    """Whether some channel of a node is found from several merged ones."""
    return any(space.name in maps and maps[space.name].sparse is None for space, _, _ in spec.locate(node))


def _same_spaces(spec: ChannelSpec, left: str, right: str) -> bool:
    return {s.name for s, _, _ in spec.locate(left)} == {s.name for s, _, _ in spec.locate(right)}


def _folds(
    spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, parameter: str, axis: int, model: int
) -> list[Fold] | None:
    found = []
    for space, axes, index in spec.locate(node):
        if space.size > 1 and axes != (axis,):
            return None
        if space.name in maps and space.size > 1:
            found.append(Fold(parameter, index, Mixing.of(maps[space.name], model, "contract")))
    return found
