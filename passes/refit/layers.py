"""The layers that refit can solve: what is linear in its weights, with the BatchNorms and scales behind it.

A layer that is not recognised, or whose weights others use, is left as the paper's rule has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.contraction import Contraction
from fxzip.graphs import attribute, linear_of
from fxzip.passes.refit.lines import line_of
from fxzip.passes.refit.slots import Uses, fill, own_parameter, slot
from fxzip.rules.keys import key_of

ANEW = "fxzip_anew"
"""Key in the meta of layers that no parent has: their weights begin as zeros, which they are not to stay."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that is linear in a weight, and those after it that act on each of its channels as a line does.

    Attributes:
        node: The node.
        source: Where its input comes from.
        weight: Qualified name of the weight.
        contraction: How the two are multiplied.
        bias: The node's argument that is its bias, or would be; None if it can have none.
        chain: The nodes after it to fold (BatchNorm, layer scale, a bias that is added).
        scale: What these multiply each channel by, float64.
        takes_bias: Whether there is a place for a bias: the node's own, or that of what is folded.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    contraction: Contraction
    bias: str | None
    chain: tuple[fx.Node, ...]
    scale: Tensor
    takes_bias: bool = True

    @property
    def end(self) -> fx.Node:
        """The last node of the chain."""
        return self.chain[-1] if self.chain else self.node

    def prior(self, module: fx.GraphModule) -> Tensor:
        """The weight with the chain folded in: (groups, o, d), float64."""
        weight = self.contraction.packed(module.get_parameter(self.weight).detach().double())
        return weight * self.scale.to(weight.device).reshape(*weight.shape[:2], 1)

    def write(self, module: fx.GraphModule, matrix: Tensor, bias: Tensor | None) -> None:
        """Set the weight (groups, o, d) and the bias (groups, o); None: it is another layer's to add one.

        The nodes of the chain hand on what they get, until `cut_out` erases them.
        """
        old = module.get_parameter(self.weight)
        old.copy_(self.contraction.unpacked(matrix).to(old))
        chain = list(self.chain)
        previous = self.node
        if self.bias is not None:
            if bias is not None or slot(module, self.node, self.bias) is not None:
                new = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias
                fill(module, self.node, self.bias, new.reshape(-1).to(old))
        elif bias is not None:
            node = chain.pop(0)
            value = self.contraction.broadcast(bias.reshape(-1)).to(old).clone()
            term = own_parameter(module, node, "bias", value, node.args[-1] if node.args else None)
            _become(node, torch.add, previous, term)
            previous = node
        for node in chain:
            _become(node, torch.positive, previous)
            previous = node

    def cut_out(self, module: fx.GraphModule) -> None:
        """Erase the nodes that hand on what they get."""
        for node in self.chain:
            if node.target is torch.positive:
                node.replace_all_uses_with(node.all_input_nodes[0])
                module.graph.erase_node(node)


def _become(node: fx.Node, function: Any, *args: fx.Node) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}


def find_layer(module: fx.GraphModule, node: fx.Node, uses: Uses, biases: bool = True) -> Layer | None:
    """The layer that a node is, as its rule says, if its weights can be solved for.

    Args:
        module: The graph.
        node: The node.
        uses: How often its parameters are used.
        biases: Whether it may get a bias that it has not.
    """
    found = linear_of(module, node)
    if found is None or not uses.alone(node):
        return None
    parameter = attribute(module, found.weight)
    if not isinstance(parameter, nn.Parameter) or not uses.once(parameter):
        return None  # a buffer is the matrix of an unmerge, which no parent has
    chain, scale = _chain(module, node, found.contraction, uses)
    takes = found.bias is not None or bool(chain)
    if not biases:
        takes = (found.bias is not None and slot(module, node, found.bias) is not None) or any(map(_shifts, chain))
    return Layer(node, found.input, found.weight, found.contraction, found.bias, chain, scale, takes)


def _shifts(node: fx.Node) -> bool:
    """Whether a node of a chain is more than a product."""
    return key_of(node.target) not in ("mul", "div", "truediv")


def _chain(
    module: fx.GraphModule, node: fx.Node, contraction: Contraction, uses: Uses
) -> tuple[tuple[fx.Node, ...], Tensor]:
    """The lines that follow a layer and nothing else uses, and what they multiply each channel by."""
    found: list[fx.Node] = []
    scale = torch.ones(contraction.sizes, dtype=torch.float64).reshape(-1)
    while len(node.users) == 1:
        (user,) = node.users
        line = line_of(module, user, node) if uses.alone(user) else None
        parts = [None] if line is None else [contraction.vector(part) for part in line]
        if parts[0] is None or parts[-1] is None:
            break
        scale = scale.to(parts[0].device) * parts[0]
        found.append(user)
        node = user
    return tuple(found), scale
