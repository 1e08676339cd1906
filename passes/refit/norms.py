"""The norms that no layer folds: each gets the scale and shift that fit best (REPAIR, arXiv 2211.08403, solved)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxzip.graphs import named_call, norm_of
from fxzip.passes.refit.regression import scale_and_shift
from fxzip.passes.refit.slots import Uses, fill, slot


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation that can be given a weight, and mostly a bias.

    Attributes:
        node: Its node.
        axis: Where its channels lie.
        shifts: Whether it can have a bias.
    """

    node: fx.Node
    axis: int
    shifts: bool

    def samples(self, value: Tensor) -> int:
        """How many samples there are of each channel."""
        return value.numel() // value.shape[self.axis]

    def fit(self, module: fx.GraphModule, values: Sequence[Tensor], goals: Sequence[Tensor]) -> list[Tensor]:
        """Set weight and bias to what brings the values that it gives nearest to the goals; the values then."""
        slope, shift = scale_and_shift(values, goals, self.axis, self.shifts)
        weight, bias = (slot(module, self.node, name) for name in ("weight", "bias"))
        like = values[0]
        fill(module, self.node, "weight", (slope if weight is None else slope * weight).to(like))
        if self.shifts:
            fill(module, self.node, "bias", (shift if bias is None else shift + slope * bias).to(like))
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return [value * slope.to(like).reshape(shape) + shift.to(like).reshape(shape) for value in values]


def find_norm(module: fx.GraphModule, node: fx.Node, uses: Uses, biases: bool = True) -> Norm | None:
    """The norm that a node is, as its rule says, used once and of one value; None for anything else.

    Args:
        module: The graph.
        node: The node.
        uses: How often its parameters are used.
        biases: Whether it may get a weight and a bias that it has not.
    """
    found, call = norm_of(module, node), named_call(module, node)
    if found is None or call is None or found.several or not uses.alone(node):
        return None
    has = {name: biases or slot(module, node, name) is not None for name in ("weight", "bias")}
    return Norm(node, found.axis, call.takes("bias") and has["bias"]) if has["weight"] else None
