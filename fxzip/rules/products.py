"""Products with something added: a layer written as one call, as the ``Conv1D`` of Hugging Face's GPT-2."""

from __future__ import annotations

from typing import Any

from fxzip.labelling.labels import Labelled
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
