"""Which parameters of a merged network take gradients: those that the parents' did, and what was made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import fx, nn

if TYPE_CHECKING:
    from fxzip.passes.cut import MergePlan
    from fxzip.passes.split import Split


def learns(modules: Iterable[nn.Module]) -> dict[str, bool]:
    """By name, whether a parameter takes gradients in one of some networks."""
    found: dict[str, bool] = {}
    for module in modules:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            found[name] = found.get(name, False) or parameter.requires_grad
    return found


def learn_as(part: fx.GraphModule, known: Mapping[str, bool]) -> None:
    """Let parameters take gradients as the parents' do.

    What no parent has (a bias that holds a BatchNorm, say) takes them if one of the layer's other parameters does, or
    of the layer before it.

    Args:
        part: The network; it is changed.
        known: By name, whether a parent's parameter takes gradients.
    """
    for name, parameter in part.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(known[name] if name in known else _beside(part, name, known))


def _beside(part: fx.GraphModule, name: str, known: Mapping[str, bool]) -> bool:
    """Whether one of the parameters beside a new one takes gradients."""
    owner = name.rpartition(".")[0]
    nodes = [
        node
        for node in part.graph.nodes
        if (node.op == "call_module" and node.target == owner)
        or any(source.op == "get_attr" and source.target == name for source in node.all_input_nodes)
    ]
    while nodes:
        near = {target for node in nodes for target in _parameters(part, node) if target in known}
        if near:
            return any(known[target] for target in near)
        nodes = [source for node in nodes for source in node.all_input_nodes if source.op != "placeholder"]
    return any(known.values())


def _parameters(part: fx.GraphModule, node: fx.Node) -> Iterable[str]:
    """The names of the parameters that a node uses."""
    if node.op == "call_module":
        yield from (f"{node.target}.{key}" for key, _ in part.get_submodule(str(node.target)).named_parameters())
    yield from (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


def learn_as_parents(plan: MergePlan, parts: Split) -> None:
    """Let the merged parameters take gradients as the parents' do."""
    own = [learns([module]) for module in plan.alignment.modules]
    shared = {name: any(o.get(n, False) for o, n in zip(own, names, strict=True)) for name, names in plan.peers.items()}
    stems = {f"{stem}.{name}": flag for stem, o in zip(parts.stems, own, strict=False) for name, flag in o.items()}
    learn_as(parts.trunk, {**own[0], **shared, **stems})
    for head, known in zip(parts.heads, own, strict=True):
        learn_as(head, known)
