"""Operations that act on each element: labels pass, and are united where operands meet."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fxzip.labelling.labels import Labelled
from fxzip.rules import jointly
from fxzip.rules.calls import IdleRule
from fxzip.rules.movement import cut_in_half
from fxzip.rules.registry import RuleContext, register_rule

NAMES = """
abs addcdiv addcmul and bernoulli bitwise_and bitwise_not bitwise_or celu ceil clamp clamp_max clamp_min clip
cos deg2rad elu eq erf erfc exp exp2 expm1 floor floor_divide floordiv frac ge gelu gt hardsigmoid hardswish
hardtanh invert isfinite isinf isnan le leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or
logsigmoid lt masked_fill maximum minimum mish mod nan_to_num ne not or
reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin softplus softshrink softsign sqrt
tan tanh tanhshrink threshold trunc where xor
""".split()

MODULES = [
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink,
    nn.Tanhshrink, nn.LogSigmoid, nn.Threshold, nn.RReLU,
]  # fmt: skip


@register_rule(*NAMES, kind="pointwise")
@register_rule("add", kind="pointwise", fresh=True, joint=jointly.sums)
@register_rule("sub", "subtract", kind="pointwise", joint=jointly.sums)
@register_rule("mul", "multiply", kind="pointwise", joint=jointly.multiplies)
@register_rule("div", "true_divide", "truediv", kind="pointwise", joint=jointly.divides)
@register_rule("clone", "neg", "negative", "pos", "positive", kind="pointwise", joint=jointly.moves)
@register_rule("pow", "square", kind="pointwise", joint=jointly.squares)
def elementwise(ctx: RuleContext, *args: Any, **kwargs: Any) -> Labelled:
    """All operands meet; ``out``, shapes and numbers say nothing."""
    return ctx.elementwise(*args, *kwargs.values())


@register_rule(*MODULES, kind="pointwise")
def elementwise_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
    """Activations."""
    return ctx.elementwise(x)


@register_rule(nn.Identity, kind="pointwise", idle=lambda given: True)
def identity(ctx: RuleContext, module: nn.Identity, input: Labelled) -> Labelled:
    """What comes in."""
    return ctx.elementwise(input)


def _dropped(switch: str) -> IdleRule:
    """Whether a dropout drops nothing: it is switched off, or its rate is 0."""
    return lambda given: given.get(switch) is False or given.get("p") == 0


@register_rule(
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, kind="pointwise",
    idle=_dropped("training"),
)  # fmt: skip
def dropout_module(ctx: RuleContext, module: nn.Module, input: Labelled) -> Labelled:
    """Each element alone, and none in eval mode."""
    return ctx.elementwise(input)


@register_rule(
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, kind="pointwise", idle=_dropped("training"), by_name=False
)
def dropout(
    ctx: RuleContext, input: Labelled, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Labelled:
    """As the module; in training unless it is told otherwise."""
    return ctx.elementwise(input)


@register_rule(F.alpha_dropout, F.feature_alpha_dropout, kind="pointwise", idle=_dropped("training"), by_name=False)
def alpha_dropout(
    ctx: RuleContext, input: Labelled, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Labelled:
    """As the module; in eval mode unless it is told otherwise."""
    return ctx.elementwise(input)


@register_rule(
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", kind="pointwise", idle=_dropped("train")
)
def native_dropout(ctx: RuleContext, input: Labelled, p: float, train: bool) -> Labelled:
    """As `torch.dropout` and the ATen operators call their arguments."""
    return ctx.elementwise(input)


@register_rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full")
@register_rule("rand_like", "randn_like", "randint_like")
def constant(ctx: RuleContext, *args: Any, **kwargs: Any) -> Labelled:
    """A constant of one value, or noise: in another order it is the same."""
    return Labelled(ctx.shape, uniform=True)


@register_rule(nn.PReLU)
def prelu_module(ctx: RuleContext, module: nn.PReLU, x: Labelled) -> Labelled:
    """A slope for each channel, or one for all."""
    slope = ctx.own("weight")
    assert slope is not None
    return prelu(ctx, x, slope)


@register_rule("prelu")
def prelu(ctx: RuleContext, input: Labelled, weight: Labelled) -> Labelled:
    """A slope for each channel, or one for all."""
    return ctx.elementwise(input, ctx.per_channel(weight, 1, like=input))


@register_rule("glu")
def glu(ctx: RuleContext, input: Labelled, dim: int = -1) -> Labelled:
    """The second half gates the first."""
    return ctx.elementwise(*cut_in_half(input, dim))


@register_rule(nn.GLU)
def glu_module(ctx: RuleContext, module: nn.GLU, x: Labelled) -> Labelled:
    """The second half gates the first."""
    return glu(ctx, x, module.dim)
