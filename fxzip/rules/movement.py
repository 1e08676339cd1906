"""Operations that only move data: the very operation is run on the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxzip.labelling.folding import mixed
from fxzip.labelling.labels import FIXED, VOID, Labelled, compress, varying
from fxzip.rules import jointly
from fxzip.rules.keys import key_of
from fxzip.rules.order import Copies, constants_apart
from fxzip.rules.registry import RuleContext, Unsupported, as_labelled, mapped, register_rule

NAMES = """
atleast_1d atleast_2d atleast_3d bfloat16 broadcast_to broadcast_tensors cat channel_shuffle chunk concat
concatenate contiguous detach double dsplit expand expand_as flatten flip float getattr getitem half hsplit hstack
im2col index_select movedim moveaxis narrow numpy_T permute pixel_shuffle pixel_unshuffle repeat repeat_interleave
reshape reshape_as roll rot90 select slice split split_with_sizes squeeze stack swapaxes swapdims t tensor_split
tile to transpose type type_as unbind unflatten unfold unsqueeze view view_as vsplit vstack to_copy
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
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "reshape_as", "view_as"}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
"""What puts tensors side by side, as they are."""
_KEEPS = {"squeeze", "unsqueeze", "atleast_1d", "atleast_2d", "atleast_3d", "lift_fresh_copy"}
"""What leaves all elements in order."""
_SHAPED = {"expand_as", "type_as", "view_as", "reshape_as"}
"""What takes only the shape of its second operand."""
_FILLS = {"pad": 3, "constant_pad_nd": 2}
"""Where operations take the value that they fill up with."""
_PATCHES = {"unfold", "im2col"}
"""What may fill up the patches at the borders by zeros."""

MODULES = [nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle]
PADS = [
    nn.Unfold, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d,
]  # fmt: skip


@register_rule(*NAMES, kind="passive", joint=jointly.moves)
@register_rule("pad", "constant_pad_nd", kind="passive", joint=jointly.pads)
def move(ctx: RuleContext, *args: Any, **kwargs: Any) -> Any:
    """Views, permutations, concatenations, slices, padding... on labels."""
    target = ctx.node.target
    name = str(key_of(target))
    if name in _FILLS:  # what is written beside the channels is no label: a constant is the same for all of them
        args, kwargs = (*args[: _FILLS[name]], *args[_FILLS[name] + 1 :]), {**kwargs, "value": VOID}
    if str(getattr(target, "__name__", target)).strip("_") in CASTS:
        value = ctx.graph.opened(as_labelled(args[0]))
        return Labelled(ctx.shape, value.factors, versions=value.versions)
    if name == "getitem" and isinstance(args[0], tuple | list):  # one of several tensors
        return args[0][args[1]]
    if name == "roll" and (rolled := _rolled(ctx, *args, **kwargs)) is not None:
        return rolled
    if name in _RESHAPES:
        return _reshaped(ctx, as_labelled(args[0] if args else kwargs["input"]))
    if isinstance(target, str):
        return run(ctx, lambda a, k: getattr(a[0], str(target))(*a[1:], **k), args, kwargs)
    assert callable(target)
    return run(ctx, lambda a, k: target(*a, **k), args, kwargs)


@register_rule(*MODULES, kind="passive", joint=jointly.moves)
@register_rule(*PADS, kind="passive", joint=jointly.pads)
def move_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Any:
    """Modules that only move data."""
    if hasattr(module, "value"):  # a constant beside the channels, as in `move`
        sides: Any = module.padding
        return run(ctx, lambda a, k: F.pad(a[0], sides, value=VOID), (x,), {})
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return _reshaped(ctx, x)
    return run(ctx, lambda a, k: module(*a), (x,), {})


def _reshaped(ctx: RuleContext, x: Labelled) -> Labelled:
    if math.prod(ctx.shape) != math.prod(x.shape):
        raise Unsupported("a view of other elements than those of its input")
    return reshaped(replace(x, factors=ctx.graph.opened(x).factors, parameter=None), *ctx.shape)


def _rolled(ctx: RuleContext, input: Labelled, shifts: Any, dims: Any = ()) -> Labelled | None:
    """A roll without spreading positions out; None where channels lie at several places along the axes."""
    input = ctx.graph.opened(input)
    pairs = zip(*([v] if isinstance(v, int) else list(v) for v in (shifts, dims)), strict=False)
    moved = {dim % len(input.shape): shift for shift, dim in pairs}
    if not moved or not all(map(ctx.graph.is_injective, input.factors)):
        return None
    found, versions = [], []
    for factor in input.factors:
        mine = {axis: shift for axis, shift in moved.items() if factor.shape[axis] > 1}
        by_position = any(shift % input.shape[axis] for axis, shift in moved.items() if axis not in mine)
        found.append(factor.roll(list(mine.values()), list(mine)) if mine else factor)
        versions.append(ctx.name if by_position else input.version(factor))
        if by_position:
            ctx.graph.use(ctx.name, factor)
    return Labelled(ctx.shape, tuple(found), uniform=input.uniform, versions=tuple(versions))


def run(ctx: RuleContext, op: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    """Run ``op`` once for each factor that its tensor arguments have."""
    args, kwargs = mapped((args, kwargs), lambda v: ctx.graph.opened(v) if isinstance(v, Labelled) else v)
    found: list[Labelled] = []
    mapped((args, kwargs), lambda v: found.append(v) if isinstance(v, Labelled) else None)

    def instead(tensor: Callable[[Labelled], Any]) -> Any:
        return _attempt(op, *mapped((args, kwargs), lambda v: tensor(v) if isinstance(v, Labelled) else v))

    name = str(key_of(ctx.node.target))
    moved = found[:1] if name in _SHAPED else found
    fills = name in _FILLS or name in _PATCHES or hasattr(ctx.module, "value") or isinstance(ctx.module, nn.Unfold)
    results = []
    for slot in _slots(found):
        copies = Copies(ctx, instead, moved, slot, name in _JOINS, name in _KEEPS)
        copies.fills = fills
        results.append((instead(partial(_dense, slot=slot)), copies))
    uniform = len({id(v) for v in found}) == 1 and found[0].uniform and not fills
    return _gather(ctx.outputs, results, uniform)


def _slots(values: list[Labelled]) -> list[dict[int, Tensor]]:
    """The factors of several values that are moved together, each slot a factor by the identity of its value.

    Factors that vary along the same axes go together; so do those along fewer axes, where the value has no other.
    """
    found: dict[tuple[frozenset[int], int], dict[int, Tensor]] = {}
    for value in values:
        seen: list[frozenset[int]] = []
        for f in value.factors:
            found.setdefault((varying(f), seen.count(varying(f))), {})[id(value)] = f
            seen.append(varying(f))
    keys = sorted(found, key=lambda key: (len(key[0]), sorted(key[0]), key[1]))
    for place, key in enumerate(keys):
        for wider in keys[place + 1 :]:
            if key[0] < wider[0] and not found[key].keys() & found[wider].keys():
                found[wider].update(found.pop(key))
                break
    return [found[key] for key in keys if key in found]


@register_rule("slice_scatter", "select_scatter", "diagonal_scatter", kind="passive")
def overwrite(ctx: RuleContext, input: Labelled, src: Labelled, *args: Any, **kwargs: Any) -> Any:
    """A part of a tensor is overwritten: the result has the labels that the same writing gives.

    The part may be treated otherwise than the rest, in positions that labels do not show: each is one set of channels.
    """
    for value in (input, src):
        ctx.use(ctx.graph.opened(value))
    target = ctx.node.target
    assert callable(target)
    return run(ctx, lambda a, k: target(*a, **k), (input, src, *args), kwargs)


@register_rule("index_put", kind="passive")
def overwrite_indexed(
    ctx: RuleContext, input: Labelled, indices: Any, values: Labelled, accumulate: bool = False
) -> Any:
    """Elements at constant indices are overwritten."""
    if accumulate or any(isinstance(index, Labelled) for index in indices):
        raise Unsupported("writes at places that depend on the input, or adds to what is there")
    for value in (input, values):
        ctx.use(ctx.graph.opened(value))
    return run(ctx, lambda a, k: torch.ops.aten.index_put(a[0], indices, a[1]), (input, values), {})


def _dense(value: Labelled, slot: dict[int, Tensor]) -> Tensor:
    """One factor at the value's full size; what has no labels of that kind is fixed, or void if it is uniform."""
    if id(value) in slot:
        return slot[id(value)].expand(value.shape)
    return torch.full(value.shape, VOID if value.uniform else FIXED)


def _attempt(op: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    """Some operations exist for floating point only: labels are exact in float64."""
    try:
        return op(args, kwargs)
    except IndexError as error:  # an index that one sample does not have
        raise Unsupported(f"it cannot be run on labels: {error}") from error
    except (RuntimeError, NotImplementedError):
        args, kwargs = mapped(
            (args, kwargs), lambda v: v.double() if isinstance(v, Tensor) and v.dtype == torch.int64 else v
        )
        try:
            result = op(args, kwargs)
        except (RuntimeError, NotImplementedError, IndexError, TypeError) as error:
            raise Unsupported(f"it cannot be run on labels: {error}") from error
        return mapped(result, lambda v: v.long() if isinstance(v, Tensor) else v)


def _gather(outputs: Any, results: list[tuple[Any, Copies]], uniform: bool, path: tuple[int, ...] = ()) -> Any:
    """Put the factors of each output tensor together again."""
    if isinstance(outputs, (tuple, list)):
        parts = enumerate(outputs)
        return tuple(_gather(o, [(r[i], copies) for r, copies in results], uniform, (*path, i)) for i, o in parts)
    shape = tuple(outputs.shape)
    if any(result.shape != outputs.shape for result, _ in results):
        raise Unsupported("an operation whose result depends on more than the positions of its input")
    found = [(constants_apart(compress(result), copies), copies) for result, copies in results]
    known = [(factor, copies.version(factor, shape, path)) for factor, copies in found if factor is not None]
    return Labelled(shape, tuple(f for f, _ in known), uniform=uniform, versions=tuple(v for _, v in known))


def reshaped(value: Labelled, *shape: int) -> Labelled:
    """The value seen with another shape; axes along which no label varies are not spread out for it."""
    groups = _groups(value.shape, shape)
    found = []
    for f in value.factors:
        spread: list[int] = []
        seen: list[int] = []
        for old, new in groups:
            varies = any(size > 1 for size in f.shape[old])
            spread += value.shape[old] if varies else f.shape[old]
            seen += shape[new] if varies else [1] * len(shape[new])
        factor = compress(f.expand(spread).reshape(seen))
        if factor is not None:
            found.append((factor, value.version(f)))
    factors, versions = tuple(f for f, _ in found), tuple(v for _, v in found)
    return Labelled(shape, factors, uniform=value.uniform, versions=versions)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]]:
    """The runs of axes of two shapes that hold the same elements, as short as can be."""
    if 0 in old:
        return [(slice(0, None), slice(0, None))]
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[first:i])) != (right := math.prod(new[second:j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        found.append((slice(first, i), slice(second, j)))
    return found


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


@register_rule(
    F.interpolate,
    F.upsample,
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    kind="passive",
    joint=jointly.moves,
)
def interpolate(ctx: RuleContext, input: Labelled, *args: Any, **kwargs: Any) -> Labelled:
    """Resizing acts on each channel alone."""
    return spatial(ctx, input, range(2, len(input.shape)))


@register_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, kind="passive", joint=jointly.moves)
def interpolate_module(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
    """Resizing acts on each channel alone."""
    return spatial(ctx, x, range(2, len(x.shape)))


def spatial(ctx: RuleContext, x: Labelled, axes: range) -> Labelled:
    """The result of an operation that mixes positions along ``axes`` and leaves the other axes alone."""
    reason = f"{ctx.name} depends on the order of channels"
    kept = [mixed(ctx.graph, f, axes, reason) for f in x.factors]
    return Labelled(ctx.shape, tuple(f for f in kept if f is not None))
