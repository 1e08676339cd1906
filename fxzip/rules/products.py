"""Products in one call with more: something added (the ``Conv1D`` of Hugging Face's GPT-2), attention."""

from __future__ import annotations

from typing import Any

from fxzip.labelling.labels import Labelled
from fxzip.rules import jointly
from fxzip.rules.contractions import matmul
from fxzip.rules.linear import added_product
from fxzip.rules.registry import RuleContext, register_rule


@register_rule("addmm", "addbmm", "baddbmm", kind="layer", linear=added_product)
def add_product(ctx: RuleContext, input: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> Labelled:
    """β input + α left @ right; ``addbmm`` sums the products over the batch."""
    product = matmul(ctx, left, right)
    if len(product.shape) > len(ctx.shape):
        product = ctx.reduce(product, 0)
    return ctx.elementwise(product, input)


def _transposed(value: Labelled) -> Labelled:
    shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
    return Labelled(shape, tuple(f.transpose(-2, -1) for f in value.factors))


def _repeated(ctx: RuleContext, value: Labelled, times: int) -> Labelled:
    """The value with each of its heads (axis -3) so many times in a row."""
    value = ctx.graph.opened(value)
    shape = (*value.shape[:-3], value.shape[-3] * times, *value.shape[-2:])
    factors = (f if f.shape[-3] == 1 else f.repeat_interleave(times, -3) for f in value.factors)
    return Labelled(shape, tuple(factors), uniform=value.uniform)


@register_rule("scaled_dot_product_attention", joint=jointly.attends)
def attention(
    ctx: RuleContext, query: Labelled, key: Labelled, value: Labelled, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Labelled:  # fmt: skip
    """softmax(Q Kᵀ) V: two products and a softmax; with ``enable_gqa`` some heads of Q share one of K and V."""
    if enable_gqa:
        key, value = (_repeated(ctx, v, query.shape[-3] // v.shape[-3]) for v in (key, value))
    logits = matmul(ctx, query, _transposed(key))
    if is_causal:  # a mask, triangular: tokens keep their places
        logits = ctx.elementwise(logits, Labelled(logits.shape[-2:]))
    if attn_mask is not None:
        logits = ctx.elementwise(logits, attn_mask)
    ctx.reduce(logits, [-1])
    return matmul(ctx, logits, value)
