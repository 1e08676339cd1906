"""The layers that refit can solve: what is linear in its weights, with the BatchNorms and scales behind it.

A layer that is not recognised, or whose weights others use, is left as the paper's rule has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxzip.contraction import Contraction, Window
from fxzip.graphs import attribute, new_parameter
from fxzip.passes.refit.lines import line_of, rank_of
from fxzip.passes.refit.slots import Uses, arguments, fill, slot, takes
from fxzip.rules.registry import key_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that is linear in a weight, and those after it that act on each of its channels as a line does.

    Attributes:
        node: The node.
        source: Where its input comes from.
        weight: Qualified name of the weight.
        contraction: How the two are multiplied.
        own_bias: Whether the node can have a bias.
        chain: The nodes after it to fold (BatchNorm, layer scale, a bias that is added).
        scale: What these multiply each channel by, float64.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    contraction: Contraction
    own_bias: bool
    chain: tuple[fx.Node, ...]
    scale: Tensor

    @property
    def end(self) -> fx.Node:
        """The last node of the chain."""
        return self.chain[-1] if self.chain else self.node

    @property
    def takes_bias(self) -> bool:
        """Whether there is a place for a bias: the node's own, or that of what is folded."""
        return self.own_bias or bool(self.chain)

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
        if self.own_bias:
            if bias is not None or slot(module, self.node, "bias") is not None:
                new = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias
                fill(module, self.node, "bias", new.reshape(-1).to(old))
        elif bias is not None:
            node = chain.pop(0)
            term = new_parameter(module, node, "bias", self.contraction.broadcast(bias.reshape(-1)).to(old).clone())
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


def find_layer(module: fx.GraphModule, node: fx.Node, uses: Uses) -> Layer | None:
    """The layer that a node is, if its weights can be solved for."""
    found = _of_module(module, node) if node.op == "call_module" else _of_function(module, node)
    if found is None or not uses.alone(node):
        return None
    source, weight, contraction = found
    parameter = attribute(module, weight)
    if contraction is None or not isinstance(parameter, nn.Parameter) or not uses.once(parameter):
        return None  # a buffer is the matrix of an unmerge, which no parent has
    chain, scale = _chain(module, node, contraction, uses)
    return Layer(node, source, weight, contraction, takes(module, node, "bias"), chain, scale)


_Found = tuple[fx.Node, str, Contraction | None]


def _of_module(module: fx.GraphModule, node: fx.Node) -> _Found | None:
    target = module.get_submodule(str(node.target))
    if len(node.args) != 1 or len(node.all_input_nodes) != 1 or node.kwargs:
        return None  # a transposed convolution that is told its output's size
    if isinstance(target, nn.Linear):
        contraction = Contraction.einsum(target.weight.shape, "i", "oi", "o")
    elif isinstance(target, _ConvNd):
        mode = {"zeros": "constant"}.get(target.padding_mode, target.padding_mode)
        contraction = _convolution(node, target.weight, vars(target), target.transposed, mode)
    else:
        return None
    return node.all_input_nodes[0], f"{node.target}.weight", contraction


def _of_function(module: fx.GraphModule, node: fx.Node) -> _Found | None:
    key = str(key_of(node.target)) if node.op in ("call_function", "call_method") else ""
    if key in ("matmul", "mm", "einsum"):
        return _of_product(module, node, key)
    given = arguments(node)
    source, weight = given.get("input"), given.get("weight")
    if not _is_parameter(weight) or not isinstance(source, fx.Node):
        return None
    tensor = attribute(module, str(weight.target))
    if key == "linear":
        contraction = Contraction.einsum(tensor.shape, "i", "oi", "o")
    elif key == "addmm" and not node.kwargs and _is_parameter(given["bias"]):
        contraction = Contraction.einsum(tensor.shape, "i", "io", "o")
    elif key.startswith("conv"):
        contraction = _convolution(node, tensor, given, key.startswith("conv_transpose"))
    else:
        return None
    return source, str(weight.target), contraction


def _of_product(module: fx.GraphModule, node: fx.Node, key: str) -> _Found | None:
    """A product of an activation with a matrix, from either side, or an einsum of the two."""
    args = node.args[1:] if key == "einsum" else node.args
    operands: Any = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if len(operands) != 2 or node.kwargs:
        return None
    place = 0 if _is_parameter(operands[0]) else 1
    source, weight = operands[1 - place], operands[place]
    if not (_is_parameter(weight) and isinstance(source, fx.Node)) or _is_parameter(source):
        return None
    shape = attribute(module, str(weight.target)).shape
    if key == "einsum":
        left, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
        terms = left.split(",")
        plain = arrow and "." not in left + output
        contraction = Contraction.einsum(shape, terms[1 - place], terms[place], output) if plain else None
    elif len(shape) != 2 or (rank_of(node) or 0) < 2:
        return None
    elif place == 0:
        contraction = Contraction.einsum(shape, "is", "oi", "os")
    else:
        contraction = Contraction.einsum(shape, "i", "io", "o")
    return source, str(weight.target), contraction


def _is_parameter(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _convolution(
    node: fx.Node, weight: Tensor, given: Any, transposed: bool, mode: str = "constant"
) -> Contraction | None:
    """A convolution with the settings that a module or a call has; None on an input without a batch."""
    kernel = tuple(weight.shape[2:])
    if rank_of(node) != len(kernel) + 2:
        return None

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        found = (value,) if isinstance(value, int) else tuple(value)
        return found * len(kernel) if len(found) == 1 else found

    dilation, groups = each("dilation", 1), int(given.get("groups", 1))
    spans = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if transposed:
        sides = zip(spans, each("padding", 0), each("output_padding", 0), strict=True)
        padding = tuple((span - part, span - part + extra) for span, part, extra in sides)
        window = Window(groups, kernel, (1,) * len(kernel), dilation, padding, spacing=each("stride", 1))
    else:
        padding = _padding(given.get("padding", 0), spans, each)
        window = Window(groups, kernel, each("stride", 1), dilation, padding, mode)
    return Contraction.convolution(weight.shape, window, transposed)


def _padding(value: Any, spans: Sequence[int], each: Any) -> tuple[tuple[int, int], ...]:
    """What is added before and behind each dimension; "same" adds the odd one behind."""
    if value == "same":
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((part, part) for part in (each("padding", 0) if value != "valid" else (0,) * len(spans)))


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
