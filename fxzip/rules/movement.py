"""Operations that only move data: the very operation is run on the labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxzip.labels import FIXED, VOID, Labelled, compress, mixed, varying
from fxzip.rules.registry import RuleContext, Unsupported, as_labelled, mapped, register_rule

NAMES = """
atleast_1d atleast_2d atleast_3d bfloat16 broadcast_to broadcast_tensors cat channel_shuffle chunk concat
concatenate contiguous detach double dsplit expand expand_as flatten flip float getitem half hsplit hstack im2col
index_select movedim moveaxis narrow numpy_T pad permute pixel_shuffle pixel_unshuffle repeat repeat_interleave
reshape reshape_as roll rot90 select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split
tile to transpose type type_as unbind unflatten unfold unsqueeze view view_as vsplit vstack constant_pad_nd to_copy
alias lift_fresh_copy
""".split()
CASTS = {
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "type_as",
    "detach",
    "to_copy",
    "alias",
    "contiguous",
}

MODULES = [
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.ZeroPad1d,
    nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d,
]  # fmt: skip


@register_rule(*NAMES, kind="passive")
def move(ctx: RuleContext, *args: Any, **kwargs: Any) -> Any:
    """Views, permutations, concatenations, slices, padding... on labels."""
    target = ctx.node.target
    if str(getattr(target, "__name__", target)).strip("_") in CASTS:
        return Labelled(ctx.shape, ctx.graph.opened(args[0]).factors)
    if isinstance(target, str):
        return run(ctx, lambda a, k: getattr(a[0], str(target))(*a[1:], **k), args, kwargs)
    assert callable(target)
    return run(ctx, lambda a, k: target(*a, **k), args, kwargs)


@register_rule(*MODULES, kind="passive")
def move_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Any:
    """Modules that only move data."""
    return run(ctx, lambda a, k: module(*a), (x,), {})


def run(ctx: RuleContext, op: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    """Run ``op`` once for each factor that its tensor arguments have."""
    args, kwargs = mapped((args, kwargs), lambda v: ctx.graph.opened(v) if isinstance(v, Labelled) else v)
    found: list[Labelled] = []
    mapped((args, kwargs), lambda v: found.append(v) if isinstance(v, Labelled) else None)
    depth = max((len(v.factors) for v in found), default=0)
    results = []
    for slot in range(depth):
        dense = partial(_dense_argument, slot=slot, peers=found)
        results.append(_attempt(op, *mapped((args, kwargs), dense)))
    uniform = bool(found) and all(v.uniform for v in found)
    return _gather(ctx.outputs, results, uniform)


def write(ctx: RuleContext, old: Labelled, index: Any, value: Labelled) -> Labelled:
    """The labels of a tensor after part of it was overwritten."""
    before = _dense(old, 0, [old, value]).clone() if old.factors or old.uniform else torch.full(old.shape, FIXED)
    after = _dense(value, 0, [old, value]) if value.factors or value.uniform else torch.full(value.shape, FIXED)
    before[index] = after
    factor = compress(before)
    return Labelled(old.shape, () if factor is None else (factor,), uniform=old.uniform and value.uniform)


def _dense_argument(value: Any, slot: int, peers: list[Labelled]) -> Any:
    return _dense(value, slot, peers) if isinstance(value, Labelled) else value


def _dense(value: Labelled, slot: int, peers: list[Labelled]) -> Tensor:
    """One factor at the value's full size; what has no labels of that kind is fixed, or void if it is uniform."""
    if value.uniform:
        return torch.full(value.shape, VOID)
    lead = max(peers, key=lambda v: len(v.factors))
    if value is lead or len(value.factors) == len(lead.factors) == 1:
        return value.factors[slot].expand(value.shape)
    twin = [f for f in value.factors if varying(f) == varying(lead.factors[slot])]
    if len(value.factors) > 1 and not twin:
        raise Unsupported("tensors whose channels lie along different axes are joined")
    return (twin or value.factors)[0].expand(value.shape) if value.factors else torch.full(value.shape, FIXED)


def _attempt(op: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    """Some operations exist for floating point only: labels are exact in float64."""
    try:
        return op(args, kwargs)
    except (RuntimeError, NotImplementedError):
        args, kwargs = mapped(
            (args, kwargs), lambda v: v.double() if isinstance(v, Tensor) and v.dtype == torch.int64 else v
        )
        result = op(args, kwargs)
        return mapped(result, lambda v: v.long() if isinstance(v, Tensor) else v)


def _gather(outputs: Any, results: list[Any], uniform: bool) -> Any:
    """Put the factors of each output tensor together again."""
    if isinstance(outputs, (tuple, list)):
        parts = [_gather(out, [r[i] for r in results], uniform) for i, out in enumerate(outputs)]
        return tuple(parts)
    factors = [compress(r) for r in results]
    shape = tuple(outputs.shape)
    if any(r.shape != outputs.shape for r in results):
        raise Unsupported("an operation whose result depends on more than the positions of its input")
    return Labelled(shape, tuple(f for f in factors if f is not None), uniform=uniform)


def reshaped(value: Labelled, *shape: int) -> Labelled:
    """The value seen with another shape."""
    factors = [compress(f.expand(value.shape).reshape(shape)) for f in value.factors]
    return Labelled(shape, tuple(f for f in factors if f is not None), uniform=value.uniform)


def cut_in_half(value: Labelled, axis: int) -> tuple[Labelled, Labelled]:
    """The two halves of a value along an axis."""
    half = value.shape[axis] // 2
    shape = list(value.shape)
    shape[axis] = half
    pairs = [f.expand(value.shape).split(half, axis) for f in value.factors]
    first, second = ([compress(pair[side]) for pair in pairs] for side in (0, 1))
    return (
        Labelled(tuple(shape), tuple(f for f in first if f is not None)),
        Labelled(tuple(shape), tuple(f for f in second if f is not None)),
    )


@register_rule("fold", "col2im", nn.Fold, kind="passive")
def fold(ctx: RuleContext, *args: Any, **kwargs: Any) -> Any:
    """Patches back into an image: overlapping patches are summed, so labels must agree wherever they meet."""
    module, x = (args[0], args[1]) if isinstance(args[0], nn.Module) else (None, as_labelled(args[0]))
    if module is None:
        module = nn.Fold(*args[1:], **kwargs)
    if len(x.factors) > 1:
        raise Unsupported("patches with channels along several axes are folded")
    factors = []
    for f in x.factors:
        dense = f.expand(x.shape).double()
        times = module(torch.ones_like(dense))
        mean = module(dense) / times.clamp(min=1)
        square = module(dense * dense) / times.clamp(min=1)
        if not bool(((square - mean * mean).abs() < 0.25).all()):
            raise Unsupported("different channels are summed by fold")
        factors.append(compress(mean.round().long()))
    return Labelled(ctx.shape, tuple(f for f in factors if f is not None))


@register_rule(
    F.interpolate,
    F.upsample,
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    kind="passive",
)
def interpolate(ctx: RuleContext, input: Labelled, *args: Any, **kwargs: Any) -> Labelled:
    """Resizing acts on each channel alone."""
    return spatial(ctx, input, range(2, len(input.shape)))


@register_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, kind="passive")
def interpolate_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
    """Resizing acts on each channel alone."""
    return spatial(ctx, x, range(2, len(x.shape)))


def spatial(ctx: RuleContext, x: Labelled, axes: range) -> Labelled:
    """The result of an operation that mixes positions along ``axes`` and leaves the other axes alone."""
    reason = f"{ctx.name} depends on the order of channels"
    kept = [mixed(ctx.graph, f, axes, reason) for f in x.factors]
    return Labelled(ctx.shape, tuple(f for f in kept if f is not None))
