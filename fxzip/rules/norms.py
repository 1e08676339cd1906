"""Normalisation: affine parameters and running statistics belong to the channels that they act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

from fxzip.labelling.labels import Labelled, along
from fxzip.rules.registry import RuleContext, register_rule

_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def _per_channel(ctx: RuleContext, x: Labelled, parameters: Sequence[Labelled | None], axis: int = 1) -> Labelled:
    laid = [ctx.per_channel(p, axis, like=x) for p in parameters if isinstance(p, Labelled)]
    return ctx.elementwise(x, *laid)


@register_rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
def batch_norm_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
    """Each channel alone."""
    return _per_channel(ctx, x, [ctx.own(name) for name in _STATISTICS])


@register_rule(F.batch_norm, F.instance_norm, "batch_norm", "instance_norm")
def batch_norm(
    ctx: RuleContext, input: Labelled, a: Any = None, b: Any = None, weight: Any = None, bias: Any = None,
    *args: Any, running_mean: Any = None, running_var: Any = None, **kwargs: Any,
) -> Labelled:  # fmt: skip
    """Each channel alone; the order in which the statistics are given does not matter."""
    return _per_channel(ctx, input, [a, b, weight, bias, running_mean, running_var])


@register_rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(ctx: RuleContext, module: Any, x: Labelled) -> Labelled:
    """Normalised over the last axes."""
    return layer_norm(ctx, x, module.normalized_shape, ctx.own("weight"), ctx.own("bias"))


@register_rule("layer_norm", "rms_norm")
def layer_norm(
    ctx: RuleContext, input: Labelled, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float | None = None, *args: Any,
) -> Labelled:  # fmt: skip
    """Normalised over the last axes."""
    ctx.reduce(input, range(-len(normalized_shape), 0))
    affine = [p for p in (weight, bias) if isinstance(p, Labelled)]
    return ctx.elementwise(input, *affine)


@register_rule(nn.GroupNorm)
def group_norm_module(ctx: RuleContext, module: nn.GroupNorm, x: Labelled) -> Labelled:
    """Normalised within groups of channels: groups move as wholes."""
    return group_norm(ctx, x, module.num_groups, ctx.own("weight"), ctx.own("bias"))


@register_rule("group_norm")
def group_norm(
    ctx: RuleContext, input: Labelled, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *args: Any,
) -> Labelled:  # fmt: skip
    """Normalised within groups of channels: groups move as wholes."""
    result = _per_channel(ctx, input, [weight, bias])
    channels = along(ctx.graph, input, 1)
    if channels is not None:
        ctx.graph.use(ctx.name, channels)
        if 1 < num_groups < len(channels):
            blocks = ctx.graph.fresh(num_groups, 1)
            ctx.graph.nest(f"{ctx.name}:groups", channels.reshape(num_groups, -1), blocks)
    return result


@register_rule(nn.LocalResponseNorm, "local_response_norm")
def local_response_norm(ctx: RuleContext, *args: Any, **kwargs: Any) -> Labelled:
    """Neighbouring channels are normalised together, so their order matters."""
    x = next(a for a in args if isinstance(a, Labelled))
    ctx.freeze(x, f"{ctx.name} depends on the order of channels")
    return Labelled(x.shape)
