"""Chains: a layer and what refit has folded into it, taken apart again.

Refit folds the lines behind a layer (a BatchNorm, a layer scale, an added bias) into its weight and bias, y = W x + b.
The parent still computes them. So they are made neutral: BatchNorms get the statistics 0 and 1, scales 1, sums 0, and
the layer gets W. What is constant in the parent, a factor of 0.5 say, is divided out. The bias goes to the layer where
it has one, else to the last of the chain that can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.contraction import Contraction
from fxzip.errors import RestoreError
from fxzip.graphs import is_static, linear_of, named_call, norm_of, static_value
from fxzip.passes.refit.lines import line_of
from fxzip.passes.refit.slots import slot
from fxzip.rules.calls import Linear
from fxzip.rules.keys import key_of

Given = tuple[str | fx.Node, tuple[str, ...], Tensor]
"""A parent's tensor (by name, or the static node that is made of it), what to call its value, and the value."""


@dataclass(frozen=True, eq=False)
class Chain:
    """A layer of a parent, and the nodes behind it that the merged network has folded into it.

    Attributes:
        parent: The parent's graph.
        nodes: The layer first.
    """

    parent: fx.GraphModule
    nodes: tuple[fx.Node, ...]

    def unfolded(
        self, module: fx.GraphModule, merged: fx.Node, linear: Linear, behind: fx.Node | None
    ) -> Iterator[Given]:
        """The values that the parent's tensors must have.

        Args:
            module: The merged graph.
            merged: The layer there.
            linear: The weight that it is linear in.
            behind: What the first node of the chain is there: nothing, or the sum that holds the layer's bias.

        Raises:
            RestoreError: Nothing of the parent's can hold the bias.
        """
        ours = linear_of(self.parent, self.nodes[0])
        if ours is None or ours.contraction.shape != linear.contraction.shape:
            raise RestoreError(f"the layer {merged.name} is another than the model's {self.nodes[0].name}")
        own = _parameter(self.parent, self.nodes[0], ours.bias)
        rest = _Rest(linear.contraction, module.get_parameter(linear.weight).detach())
        rest.bias = _bias_of(module, merged, linear, behind)
        for node, before in reversed(list(zip(self.nodes[1:], self.nodes, strict=False))):
            yield from self._neutral(node, before, rest, hold=own is None)
        label = (linear.weight,) if rest.plain else (self.nodes[0].name, "weight")
        yield ours.weight, label, rest.weight
        if own is not None:
            bias = rest.bias if rest.bias is not None else rest.weight.new_zeros(rest.contraction.sizes).reshape(-1)
            yield own, (self.nodes[0].name, "bias"), bias
        elif rest.bias is not None and bool((rest.bias != 0).any()):
            raise RestoreError(
                f"refit gave {self.nodes[0].name} a bias, for which the model's class has no place: merge with "
                "refit=fxzip.RefitOptions(biases=False), which adds no biases that a class cannot hold"
            )

    def _neutral(self, node: fx.Node, before: fx.Node, rest: _Rest, hold: bool) -> Iterator[Given]:
        """The values that let a node of the chain hand on what it gets, plus the bias if it is to hold it."""
        norm = norm_of(self.parent, node)
        if norm is not None:
            yield from self._neutral_norm(node, rest, hold)
            return
        other = next(given for given in node.args if given is not before)
        name, call = node.name, key_of(node.target)
        if not (isinstance(other, fx.Node) and is_static(other) and self._learned(other)):
            rest.divide(line_of(self.parent, node, before), node)
            return
        shape = self._shape(other)
        if call not in ("add", "sub"):
            yield other, (name, "scale"), rest.weight.new_ones(shape)
            return
        value = rest.weight.new_zeros(shape)
        if hold and rest.bias is not None:
            laid = rest.contraction.broadcast(rest.bias)
            laid = laid.reshape(shape) if laid.numel() == value.numel() else laid
            if laid.shape == value.shape:
                value, rest.bias = (-laid if call == "sub" else laid), None
        yield other, (name, "bias"), value

    def _neutral_norm(self, node: fx.Node, rest: _Rest, hold: bool) -> Iterator[Given]:
        call = named_call(self.parent, node)
        assert call is not None
        names = {key: _parameter(self.parent, node, key) for key in ("running_mean", "running_var", "weight", "bias")}
        mean = slot(self.parent, node, "running_mean")
        assert mean is not None
        like = rest.weight.new_zeros(mean.shape)
        shift = like
        if hold and rest.bias is not None:
            shift, rest.bias = rest.bias.reshape(mean.shape), None
        eps = float(call.arguments.get("eps", 1e-5))
        scaled = names["weight"] is not None
        root = torch.sqrt(torch.tensor(1 + eps, dtype=torch.float64)).item()
        values = {
            "running_mean": like if names["bias"] is not None else -shift,
            "running_var": like + (1 if scaled else 1 - eps),
            "weight": like + root,
            "bias": shift,
        }
        for key, source in names.items():
            if source is not None:
                yield source, (node.name, key), values[key]

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a static node's value."""
        value = node.meta.get("val")
        value = static_value(self.parent, node) if value is None else value
        assert isinstance(value, Tensor)
        return tuple(value.shape)

    def _learned(self, node: fx.Node) -> bool:
        """Whether a static node is made of what is in the state dict."""
        if node.op == "get_attr":
            return str(node.target) in self.parent.state_dict()
        return all(map(self._learned, node.all_input_nodes))


@dataclass(eq=False)
class _Rest:
    """What the nodes in front must still compute: W x + b.

    Attributes:
        contraction: Of the layer.
        weight: W, as the layer has it.
        bias: b, a value for each output; None for 0.
        plain: Whether W is the merged network's own.
    """

    contraction: Contraction
    weight: Tensor
    bias: Tensor | None = None
    plain: bool = field(default=True)

    def divide(self, line: tuple[Tensor, Tensor] | None, node: fx.Node) -> None:
        """Take out what a constant line behind does."""
        parts = [None if part is None else self.contraction.vector(part) for part in line or (None, None)]
        slope, offset = parts
        if slope is None or offset is None or not bool((slope != 0).all()):
            raise RestoreError(f"what {node.name} multiplies by or adds cannot be taken out of the layer before it")
        if bool((offset != 0).any()):
            zero = self.weight.new_zeros(len(offset)) if self.bias is None else self.bias
            self.bias = zero - offset.to(zero)
        if bool((slope != 1).any()):
            packed = self.contraction.packed(self.weight.double())
            scaled = packed / slope.to(packed).reshape(*packed.shape[:2], 1)
            self.weight = self.contraction.unpacked(scaled).to(self.weight)
            self.bias = None if self.bias is None else self.bias / slope.to(self.bias)
            self.plain = False


def find_chain(parent: fx.GraphModule, node: fx.Node, counterpart: Callable[[fx.Node], fx.Node | None]) -> Chain | None:
    """The chain that begins at a layer; None where nothing is folded into it.

    Args:
        parent: The parent's graph.
        node: A node of it.
        counterpart: Gives a node's counterpart in the merged graph.
    """
    if linear_of(parent, node) is None:
        return None
    found = [node]
    while len(found[-1].users) == 1:
        (user,) = found[-1].users
        if line_of(parent, user, found[-1]) is None or not _changed(user, counterpart(user)):
            break
        found.append(user)
    return Chain(parent, tuple(found)) if len(found) > 1 else None


def _changed(node: fx.Node, merged: fx.Node | None) -> bool:
    """Whether a node is gone, or does something else now."""
    if merged is None:
        return True
    if node.op == "call_module" or merged.op == "call_module":
        return node.op != merged.op and not is_norm(merged)
    names = [{n.name for n in each.all_input_nodes if n.op == "get_attr"} for each in (node, merged)]
    return key_of(node.target) != key_of(merged.target) or names[0] != names[1]


def is_norm(merged: fx.Node) -> bool:
    """Whether a merged node calls a norm that was left in place."""
    owner = merged.graph.owning_module
    return merged.op == "call_module" and owner is not None and norm_of(owner, merged) is not None


def _bias_of(module: fx.GraphModule, merged: fx.Node, linear: Linear, behind: fx.Node | None) -> Tensor | None:
    """The bias of a merged layer, a value for each output: its own, or that of the sum behind it."""
    if linear.bias is not None:
        own = slot(module, merged, linear.bias)
        if own is not None:
            return own.reshape(-1)
    if behind is None:
        return None
    line = line_of(module, behind, merged)
    offset = None if line is None else linear.contraction.vector(line[1])
    return None if offset is None else offset.to(module.get_parameter(linear.weight).dtype)


def _parameter(parent: fx.GraphModule, node: fx.Node, name: str | None) -> str | fx.Node | None:
    """The parent's tensor that an argument is: its name, or the static node that is made of it."""
    call = named_call(parent, node)
    if call is None or name is None:
        return None
    direct = call.parameter(name)
    if direct is not None:
        return direct
    value: Any = call.arguments.get(name)
    return value if isinstance(value, fx.Node) and is_static(value) else None
