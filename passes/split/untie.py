"""Untie: a parameter that produces channels at one node of the trunk and contracts them at another becomes two.

A language model whose embedding is its read-out too has one matrix in two roles. Merged channels are averaged where
they are produced (M) and summed where they are contracted (U); with merges inside a model these are different
matrices. Mostly the trunk has one of the roles and the heads have the other, each with its own copy, and there is
nothing to do here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec, Role
from fxzip.passes.split.stems import STEM


@dataclass(frozen=True)
class Untied:
    """A parameter that was made from another.

    Attributes:
        source: The one that it was tied to, as the sites name it.
        roles: The role of its axes where it is not that of the sites, by axis.
    """

    source: str
    roles: Mapping[int, Role]


def untie(trunk: fx.GraphModule, spec: ChannelSpec) -> dict[str, Untied]:
    """Give nodes that use a parameter in another role than its sites say a parameter of their own.

    Args:
        trunk: The trunk, whose nodes have the names of the first model's; it is changed.
        spec: The channel spaces.

    Returns:
        The new parameters by their qualified names.
    """
    found: dict[str, Untied] = {}
    for node in list(trunk.graph.nodes):
        if STEM in node.meta:
            continue  # it joins what the models' own nodes of this name give
        by_parameter: dict[str, dict[int, Role]] = {}
        for parameter, axis, role in spec.opposed.get(node.name, ()):
            by_parameter.setdefault(parameter, {})[axis] = role
        for parameter, roles in by_parameter.items():
            tensor = trunk.get_parameter(parameter)
            found |= dict.fromkeys(_replace(trunk, node, tensor), Untied(parameter, roles))
    if found:
        trunk.recompile()
    return found


def _replace(trunk: fx.GraphModule, node: fx.Node, tensor: Tensor) -> list[str]:
    """Names of the parameters that take the place of a tensor at a node."""
    names = []
    if node.op == "call_module":
        module = trunk.get_submodule(str(node.target))
        for key, parameter in list(module.named_parameters()):
            if parameter is tensor:
                setattr(module, key, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
                names.append(f"{node.target}.{key}")
    for source in node.all_input_nodes:
        if source.op == "get_attr" and trunk.get_parameter(str(source.target)) is tensor:
            name = f"{node.name}_untied"
            trunk.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
            with trunk.graph.inserting_before(node):
                node.replace_input_with(source, trunk.graph.get_attr(name))
            names.append(name)
    return names
