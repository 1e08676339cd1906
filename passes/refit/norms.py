"""The norms that no layer folds: each gets the scale and shift that fit best (REPAIR, arXiv 2211.08403, solved)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxzip.graphs import named_call, norm_of
from fxzip.passes.refit.slots import Uses, fill, slot
from fxzip.passes.refit.systems import SLIGHT
from fxzip.processes import ALONE, Total


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

    def fit(
        self, module: fx.GraphModule, values: Sequence[Tensor], goals: Sequence[Tensor], total: Total = ALONE.total
    ) -> list[Tensor]:
        """Set weight and bias to what brings the values that it gives nearest to the goals; the values then.

        Args:
            module: The merged network.
            values: What it gives, in batches.
            goals: What it should give.
            total: Sums over processes that have other batches.
        """
        slope, shift = scale_and_shift(values, goals, self.axis, self.shifts, total)
        weight, bias = (slot(module, self.node, name) for name in ("weight", "bias"))
        like = values[0] if values else next(module.parameters())  # a process may have no batch
        fill(module, self.node, "weight", (slope if weight is None else slope * weight).to(like))
        if self.shifts:
            fill(module, self.node, "bias", (shift if bias is None else shift + slope * bias).to(like))
        if not values:
            return []
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


def scale_and_shift(
    values: Sequence[Tensor], goals: Sequence[Tensor], axis: int, intercept: bool = True, total: Total = ALONE.total
) -> tuple[Tensor, Tensor]:
    """The least-squares line t ≈ a x + b for each channel along an axis, float64.

    Args:
        values: x, in batches.
        goals: t, in batches of the same shapes.
        axis: Where the channels lie.
        intercept: Whether there is a b; else it is 0.
        total: Sums over processes that have other batches.

    Returns:
        a and b; a = 1 where x varies by no more than a thousandth of its size.
    """

    def mean(of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = ((v.movedim(axis, 0).flatten(1) for v in pair) for pair in zip(values, goals, strict=True))
        parts = [of(x.double(), t.double()).sum(1) for x, t in rows]
        count = sum(v.numel() for v in values) / len(parts[0]) if parts else 0
        own = [torch.stack(parts).sum(0), parts[0].new_tensor(count)] if parts else None
        sums, samples = total("a norm", own)
        return sums / samples

    mean_x = mean(lambda x, _: x) if intercept else torch.zeros((), dtype=torch.float64)
    mean_t = mean(lambda _, t: t) if intercept else torch.zeros((), dtype=torch.float64)
    if values:
        mean_x, mean_t = mean_x.to(values[0].device), mean_t.to(values[0].device)
    power = mean(lambda x, _: (x - mean_x[..., None]).square())
    product = mean(lambda x, t: (x - mean_x[..., None]) * (t - mean_t[..., None]))
    flat = power <= (SLIGHT**2 * (power + mean_x.square())).clamp_min(1e-12 * power.max().clamp(min=1e-30))
    slope = torch.where(flat, torch.ones_like(power), product / power.clamp(min=1e-30))
    return slope, (mean_t - slope * mean_x) if intercept else torch.zeros_like(slope)
