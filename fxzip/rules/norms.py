"""Normalisation: affine parameters and running statistics belong to the channels that they act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxzip.labelling.folding import along
from fxzip.labelling.labels import VOID, Labelled, in_place, varying
from fxzip.rules.calls import Norm
from fxzip.rules.registry import RuleContext, Unsupported, register_rule


def _per_channel(ctx: RuleContext, x: Labelled, parameters: Sequence[Labelled | None], axis: int = 1) -> Labelled:
    laid = [ctx.per_channel(p, axis, like=x) for p in parameters if isinstance(p, Labelled)]
    return ctx.elementwise(x, *laid)


def _normed(ctx: RuleContext, x: Labelled, mean: Any, var: Any, weight: Any, bias: Any) -> Labelled:
    """Each channel alone, with running statistics, where there are some, and affine parameters."""
    result = _per_channel(ctx, x, [mean, var, weight, bias])
    ctx.statistic(mean, "mean")
    ctx.statistic(var, "variance")
    return result


def _batch_norm(given: Mapping[str, Any]) -> Norm:
    return Norm(1, statistics=True)


def _native_batch_norm(given: Mapping[str, Any]) -> Norm:
    return Norm(1, statistics=True, several=True)


def _of_channels(given: Mapping[str, Any]) -> Norm:
    return Norm(1)


def _layer(given: Mapping[str, Any]) -> Norm | None:
    return Norm(-1, over="layer") if len(given.get("normalized_shape", ())) == 1 else None


def _rms(given: Mapping[str, Any]) -> Norm | None:
    return Norm(-1, over="rms") if len(given.get("normalized_shape", ())) == 1 else None


def _own(ctx: RuleContext) -> tuple[Labelled | None, ...]:
    return tuple(ctx.own(name) for name in ("running_mean", "running_var", "weight", "bias"))


@register_rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, norm=_batch_norm, fresh=True
)  # fmt: skip
def batch_norm_module(ctx: RuleContext, module: nn.Module, input: Labelled) -> Labelled:
    """Each channel alone."""
    return _normed(ctx, input, *_own(ctx))


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, norm=_of_channels)
def instance_norm_module(ctx: RuleContext, module: nn.Module, input: Labelled) -> Labelled:
    """Each channel alone."""
    return _normed(ctx, input, *_own(ctx))


@register_rule(F.batch_norm, norm=_batch_norm, fresh=True, by_name=False)
def batch_norm(
    ctx: RuleContext, input: Labelled, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Labelled:  # fmt: skip
    """Each channel alone."""
    return _normed(ctx, input, running_mean, running_var, weight, bias)


@register_rule("batch_norm", norm=_batch_norm, fresh=True)
def torch_batch_norm(
    ctx: RuleContext, input: Labelled, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float, cudnn_enabled: bool,
) -> Labelled:  # fmt: skip
    """Each channel alone, as `torch.batch_norm` and the ATen operator call their arguments."""
    return _normed(ctx, input, running_mean, running_var, weight, bias)


@register_rule(
    torch.native_batch_norm, torch.ops.aten.native_batch_norm.default, torch.ops.aten._native_batch_norm_legit.default,
    norm=_native_batch_norm, by_name=False,
)  # fmt: skip
def native_batch_norm(
    ctx: RuleContext, input: Labelled, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float,
) -> tuple[Labelled, ...]:  # fmt: skip
    """Each channel alone; the batch's statistics come out behind the result."""
    if training:
        raise Unsupported("a BatchNorm in training")
    return _with_nothing(ctx, _normed(ctx, input, running_mean, running_var, weight, bias))


@register_rule(
    torch.ops.aten._native_batch_norm_legit_no_training.default, norm=_native_batch_norm, by_name=False
)  # fmt: skip
def batch_norm_in_eval_mode(
    ctx: RuleContext, input: Labelled, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float,
    eps: float,
) -> tuple[Labelled, ...]:  # fmt: skip
    """Each channel alone; what comes out behind the result is empty."""
    return _with_nothing(ctx, _normed(ctx, input, running_mean, running_var, weight, bias))


def _with_nothing(ctx: RuleContext, result: Labelled) -> tuple[Labelled, ...]:
    """The result of an operator that in eval mode gives empty statistics behind it."""
    return (result, *(Labelled(tuple(value.shape)) for value in ctx.outputs[1:]))


@register_rule(F.instance_norm, norm=_of_channels, by_name=False)
def instance_norm(
    ctx: RuleContext, input: Labelled, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Labelled:  # fmt: skip
    """Each channel alone."""
    return _normed(ctx, input, running_mean, running_var, weight, bias)


@register_rule("instance_norm", norm=_of_channels)
def torch_instance_norm(
    ctx: RuleContext, input: Labelled, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    use_input_stats: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Labelled:  # fmt: skip
    """Each channel alone, as `torch.instance_norm` and the ATen operator call their arguments."""
    return _normed(ctx, input, running_mean, running_var, weight, bias)


@register_rule(nn.LayerNorm, norm=_layer, fresh=True)
def layer_norm_module(ctx: RuleContext, module: nn.LayerNorm, input: Labelled) -> Labelled:
    """Normalised over the last axes."""
    return layer_norm(ctx, input, module.normalized_shape, ctx.own("weight"), ctx.own("bias"))


@register_rule(nn.RMSNorm, norm=_rms)
def rms_norm_module(ctx: RuleContext, module: nn.RMSNorm, input: Labelled) -> Labelled:
    """Normalised over the last axes."""
    return layer_norm(ctx, input, module.normalized_shape, ctx.own("weight"))


@register_rule("layer_norm", norm=_layer, fresh=True)
def layer_norm(
    ctx: RuleContext, input: Labelled, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float | None = None, *args: Any,
) -> Labelled:  # fmt: skip
    """Normalised over the last axes."""
    ctx.reduce(input, range(-len(normalized_shape), 0))
    affine = [p for p in (weight, bias) if isinstance(p, Labelled)]
    return ctx.elementwise(input, *affine)


@register_rule("rms_norm", norm=_rms)
def rms_norm(
    ctx: RuleContext, input: Labelled, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Labelled:
    """Normalised over the last axes."""
    return layer_norm(ctx, input, normalized_shape, weight)


@register_rule(nn.GroupNorm, norm=_of_channels, fresh=True)
def group_norm_module(ctx: RuleContext, module: nn.GroupNorm, input: Labelled) -> Labelled:
    """Normalised within groups of channels: groups move as wholes."""
    return group_norm(ctx, input, module.num_groups, ctx.own("weight"), ctx.own("bias"))


@register_rule("group_norm", norm=_of_channels, fresh=True)
def group_norm(
    ctx: RuleContext, input: Labelled, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *args: Any,
) -> Labelled:  # fmt: skip
    """Normalised within groups of channels: groups move as wholes."""
    filled = any(1 in varying(f) and bool((f == VOID).any()) for f in input.factors)
    result = _per_channel(ctx, input, [weight, bias])
    if filled and num_groups > 1:  # constants are no longer alike: in each group they become something else
        held = [in_place(f) if 1 in varying(f) else f for f in result.factors]
        result = replace(result, factors=tuple(held), versions=())
    channels = along(ctx.graph, result if filled else input, 1)
    if channels is not None:
        ctx.graph.use(ctx.name, channels)
        if num_groups == 1:
            ctx.graph.summed.append((ctx.name, channels, (0,)))
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
