"""Means, maxima, norms, softmax and pooling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fxzip.labelling.labels import Labelled
from fxzip.rules import jointly
from fxzip.rules.calls import JointRule
from fxzip.rules.movement import spatial
from fxzip.rules.registry import RuleContext, Unsupported, register_rule


@register_rule("mean", kind="passive", joint=jointly.averages)
@register_rule("sum", kind="passive", joint=jointly.totals)
@register_rule(
    "amax", "amin", "std", "var", "prod", "all", "any", "logsumexp", "norm", "vector_norm", "nansum",
    "linalg_vector_norm", kind="passive",
)  # fmt: skip
def reduce(ctx: RuleContext, input: Labelled, *args: Any, **kwargs: Any) -> Labelled:
    """Symmetric functions of the elements along some axes."""
    axes = kwargs.get("dim", kwargs.get("axis"))
    numbers = [a for a in args if isinstance(a, (int, tuple, list)) and not isinstance(a, bool)]
    if str(ctx.node.target).find("norm") >= 0:
        numbers = numbers[1:] if args and isinstance(args[0], (int, float)) else numbers
    if axes is None and numbers:
        axes = numbers[0]
    keepdim = len(ctx.shape) == len(input.shape)
    return ctx.reduce(input, axes, keepdim)


@register_rule("max", "min")
def extreme(ctx: RuleContext, input: Labelled, *args: Any, **kwargs: Any) -> Any:
    """The maximum of two tensors, of all elements, or along an axis with the positions."""
    others = [v for v in (*args, *kwargs.values()) if isinstance(v, Labelled)]
    if others:
        return ctx.elementwise(input, *others)
    dim = kwargs.get("dim", args[0] if args else None)
    if dim is None:
        return ctx.reduce(input, None)
    values = ctx.reduce(input, dim, len(ctx.outputs[0].shape) == len(input.shape))
    moved = any(f.shape[dim] > 1 for f in input.factors)
    if moved and any(user.args[1:] == (1,) and user.users for user in ctx.node.users):
        raise Unsupported("the position of a maximum among channels is used")
    return values, Labelled(values.shape)


@register_rule("softmax", "log_softmax", "softmin", "normalize")
def softmax(ctx: RuleContext, input: Labelled, *args: Any, **kwargs: Any) -> Labelled:
    """Normalised over a set of elements: they move together."""
    dim = kwargs.get("dim")
    if dim is None:
        ints = [a for a in args if isinstance(a, int)]
        dim = ints[-1] if "normalize" in str(ctx.node.target) and len(ints) > 1 else ints[0] if ints else 1
    ctx.reduce(input, dim)
    return Labelled(ctx.shape, input.factors)


@register_rule(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def softmax_module(ctx: RuleContext, module: Any, x: Labelled) -> Labelled:
    """Normalised over a set of elements: they move together."""
    ctx.reduce(x, 1 if module.dim is None else module.dim)
    return Labelled(ctx.shape, x.factors)


@register_rule(nn.Softmax2d)
def softmax2d(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
    """Softmax over channels at each pixel."""
    ctx.reduce(x, -3)
    return Labelled(ctx.shape, x.factors)


_POOLS: dict[JointRule | None, tuple[str, ...]] = {
    jointly.spreads: ("avg_pool",),
    jointly.moves: ("adaptive_avg_pool",),
    None: ("max_pool", "lp_pool", "adaptive_max_pool"),
}
"""The pools by what they do to channels as vectors."""


def _pooled(ctx: RuleContext, x: Labelled, dims: int) -> Any:
    rank = len(x.shape)
    axes = range(rank - dims, rank)
    first = ctx.outputs[0] if isinstance(ctx.outputs, tuple | list) else ctx.outputs
    if all(first.shape[a] == 1 for a in axes):
        pooled = ctx.reduce(x, list(axes), keepdim=True)
    else:
        pooled = spatial(replace(ctx, outputs=first), x, axes)
    return (pooled, Labelled(pooled.shape)) if isinstance(ctx.outputs, tuple | list) else pooled


def _title(name: str) -> str:
    """The module class of a function: AvgPool2d of avg_pool2d."""
    return "".join(part.capitalize() for part in name.split("_"))


def _register_pools() -> None:
    for dims in (1, 2, 3):

        def function(ctx: RuleContext, input: Labelled, *args: Any, dims: int = dims, **kwargs: Any) -> Any:
            return _pooled(ctx, input, dims)

        def module(ctx: RuleContext, module: nn.Module, x: Labelled, dims: int = dims) -> Any:
            return _pooled(ctx, x, dims)

        register_rule(f"max_pool{dims}d_with_indices", kind="passive")(function)
        for joint, pools in _POOLS.items():
            uniform = joint is not jointly.spreads  # at the borders a mean is of fewer
            names = [f"{pool}{dims}d" for pool in pools]
            classes = [getattr(nn, _title(name)) for name in names if hasattr(nn, _title(name))]
            register_rule(*names, kind="passive", joint=joint, uniform=uniform)(function)
            register_rule(*classes, kind="passive", joint=joint, uniform=uniform)(module)


_register_pools()
