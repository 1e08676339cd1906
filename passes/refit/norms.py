"""The norms that no layer folds: each gets the scale and shift that fit best (REPAIR, arXiv 2211.08403, solved)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxzip.passes.refit.lines import is_batch_norm
from fxzip.passes.refit.regression import scale_and_shift
from fxzip.passes.refit.slots import Uses, arguments, fill, slot, takes
from fxzip.rules.registry import key_of

_OVER_CHANNELS = (nn.LayerNorm, nn.RMSNorm)
_OF_CHANNELS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


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


def find_norm(module: fx.GraphModule, node: fx.Node, uses: Uses) -> Norm | None:
    """The norm that a node is, over one axis and used once; None for anything else."""
    target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    key = key_of(node.target) if node.op in ("call_function", "call_method") else None
    if is_batch_norm(module, node) or isinstance(target, _OF_CHANNELS) or key in ("group_norm", "instance_norm"):
        axis = 1
    elif isinstance(target, _OVER_CHANNELS) or key in ("layer_norm", "rms_norm"):
        shape = target.normalized_shape if target is not None else arguments(node)["normalized_shape"]
        if len(shape) != 1:
            return None
        axis = -1
    else:
        return None
    return Norm(node, axis, takes(module, node, "bias")) if uses.alone(node) else None
