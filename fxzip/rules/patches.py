"""Patches of images that are put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxzip.labelling.labels import Labelled, compress
from fxzip.rules import jointly
from fxzip.rules.registry import RuleContext, as_labelled, register_rule


@register_rule("fold", "col2im", nn.Fold, kind="passive", joint=jointly.spreads, uniform=False)
def fold(ctx: RuleContext, *args: Any, **kwargs: Any) -> Any:
    """Patches back into an image: overlapping patches are summed, and labels that are summed are tied."""
    called = isinstance(args[0], nn.Fold)
    x = as_labelled(args[called])
    module = args[0] if called else nn.Fold(*args[1:], **kwargs)
    places = _pixels(module, ctx.shape)
    factors = []
    for f in x.factors:
        dense = f.expand(x.shape).reshape(-1)
        image = torch.zeros(1 + torch.Size(ctx.shape).numel(), dtype=torch.int64)
        image = image.scatter_reduce(0, places, dense, "amax")
        pairs = torch.stack([dense, image[places]], 1)[places > 0].unique(dim=0)
        ctx.graph.unite(pairs[:, 0], pairs[:, 1])
        factors.append(compress(image[1:].reshape(ctx.shape)))
    return Labelled(ctx.shape, tuple(f for f in factors if f is not None))


def _pixels(module: nn.Fold, shape: tuple[int, ...]) -> Tensor:
    """For each element of the patches, flat, one plus the element of the image that it is added to; 0 for none."""
    image = torch.arange(1, 1 + torch.Size(shape).numel()).double().reshape(shape)
    patches = F.unfold(image, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.long().reshape(-1)
