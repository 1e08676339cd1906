"""Split: one shared trunk up to the cut, and each model's own rest as a head.

What crosses the cut is passed from the trunk to the heads, where each model's channels are found again
(`fxzip.passes.split.heads`). Where merging begins behind the input, the trunk begins with each model's own stem
(`fxzip.passes.split.stems`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxzip.channels import ChannelSpace, Site
from fxzip.graphs import is_within
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.resize import Resized
from fxzip.passes.resize.shapes import SCALED
from fxzip.passes.split.fuse import fuse_parameter, places_by_parameter
from fxzip.passes.split.heads import head
from fxzip.passes.split.laid import Laid
from fxzip.passes.split.parts import part
from fxzip.passes.split.stems import Stems
from fxzip.passes.split.untie import untie


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


def split(plan: MergePlan) -> Split:
    """Build trunk and heads, with weights merged by the paper's rule."""
    stems = Stems(plan)
    trunk = _trunk(plan, stems)
    _write_fused(trunk, plan, (*stems.prefixes, *stems.joins))
    return Split(trunk, tuple(head(plan, model) for model in plan.models), stems.prefixes)


def _trunk(plan: MergePlan, stems: Stems) -> fx.GraphModule:
    module = plan.trunk
    early = {plan.name(i) for i in range(plan.begin)} - plan.learned(0)
    keep = plan.places(0).keys() - early
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    stems.insert(graph, copies)
    for node in module.graph.nodes:
        scaled = SCALED in node.meta and all(source in copies for source in node.all_input_nodes)
        if (node.name in keep or scaled) and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[plan.trunk_node(i)] for i in plan.crossing))
    return part(stems.root(), graph, "Trunk")


def _write_fused(trunk: fx.GraphModule, plan: MergePlan, unmerged: Sequence[str]) -> None:
    """Replace the trunk's parameters and buffers by the merged ones, but for those of ``unmerged`` modules."""
    states = [module.state_dict(keep_vars=True) for module in plan.alignment.modules]
    found = places_by_parameter(plan.spec, plan.maps, None if plan.resized is None else laid_by(plan.resized))
    by_tensor = {id(states[0][name]): places for name, places in found.items()}
    untied = untie(trunk, plan.spec)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in trunk.state_dict(keep_vars=True).items():
            if is_within(name, unmerged) or id(tensor) in done:
                continue  # a tied parameter has several names, of which one has the sites
            done.add(id(tensor))
            own = untied.get(name)
            source = name if own is None else own.source
            tensors = [state[peer] for state, peer in zip(states, plan.peers[source], strict=True)]
            places = by_tensor.get(id(tensors[0]), ())
            if own is not None:
                places = [replace(p, role=own.roles.get(p.axes[0], p.role)) for p in places]
            tensor.copy_(fuse_parameter(tensors, places))


def laid_by(resized: Resized) -> Callable[[ChannelSpace, Site], Laid]:
    """Where channels come to lie in the parameters of a resized network, by where they lie in the old one."""
    state = resized.module.state_dict(keep_vars=True)

    def laid(space: ChannelSpace, site: Site) -> Laid:
        new = resized.site(space, site)
        return Laid(new.index, (state[new.parameter].shape[new.axis],), new.rows)

    return laid
