"""What the paper's rule is with its BatchNorm statistics reset: the weights that refit holds its layers to.

A merged layer gives values of another variance than its BatchNorm's statistics say, which are averages of the
parents'. The paper resets them on images; so does this, layer by layer, on what the layers before give once they are
refitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxzip.graphs import named_call, norm_of
from fxzip.moments import is_noise
from fxzip.passes.refit.layers import Layer
from fxzip.passes.refit.slots import slot
from fxzip.passes.refit.sums import precise
from fxzip.processes import ALONE, Total


def norm_behind(module: fx.GraphModule, layer: Layer) -> fx.Node | None:
    """The first BatchNorm that is folded into a layer."""
    found = ((node, norm_of(module, node)) for node in layer.chain)
    return next((node for node, norm in found if norm is not None and norm.statistics), None)


def reset_scale(
    module: fx.GraphModule, layer: Layer, norm: fx.Node, values: Sequence[Tensor], total: Total = ALONE.total
) -> Tensor:
    """What resetting a BatchNorm's statistics multiplies a layer's channels by: (groups, o), float64.

    Args:
        module: The merged network, its BatchNorm as it was.
        layer: The layer.
        norm: The BatchNorm behind it.
        values: What goes into the BatchNorm, batch by batch; their means and variances are averaged
            (`fxzip.passes.recalibrate`).
        total: Sums over processes that have other batches.
    """
    call, found = named_call(module, norm), norm_of(module, norm)
    old = slot(module, norm, "running_var")
    assert call is not None
    assert found is not None
    assert old is not None
    rows = [precise(value.movedim(found.axis, 0).flatten(1)) for value in values]
    moments = [torch.var_mean(row, 1, correction=min(1, row.shape[1] - 1)) for row in rows]
    own = [torch.stack(each).double().sum(0) for each in zip(*moments, strict=True)] if rows else None
    count, var, mean = total("BatchNorm statistics", own and [own[0].new_tensor(len(rows)), *own])
    mean, var = mean / count, var / count
    old, eps = old.detach().double(), call.arguments.get("eps", 1e-5)
    var = torch.where(is_noise(var, mean), old, var)
    scale: Tensor = ((old + eps) / (var + eps)).sqrt()
    return scale.reshape(layer.contraction.count, -1)
