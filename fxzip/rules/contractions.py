"""Operations that sum over channels: labels on the contracted axis end, those of the weights' rows begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxzip.labelling.folding import along, mixed, reduce
from fxzip.labelling.labels import Labelled, varying
from fxzip.labelling.meeting import meet
from fxzip.rules import jointly
from fxzip.rules import linear as weights
from fxzip.rules.registry import RuleContext, Unsupported, as_labelled, register_rule


def _name(weight: Any) -> str:
    if not isinstance(weight, Labelled) or weight.parameter is None:
        raise Unsupported("weights that are computed from the input")
    return weight.parameter


def _weight(ctx: RuleContext) -> Labelled:
    weight = ctx.own("weight")
    assert weight is not None
    return weight


def _with_bias(ctx: RuleContext, result: Labelled, bias: Any, axis: int) -> Labelled:
    if isinstance(bias, Labelled):
        return ctx.elementwise(result, ctx.per_channel(bias, axis, like=result))
    return result


def _contract(ctx: RuleContext, x: Labelled, axis: int, columns: torch.Tensor) -> None:
    """The weight's columns meet the labels of ``x`` along an axis."""
    labels = along(ctx.graph, x, axis)
    if labels is None:
        if not x.uniform:
            ctx.graph.freeze(columns, "input")
    else:
        ctx.graph.unite(columns.reshape(-1), labels)


def _settled(ctx: RuleContext, x: Labelled, axis: int) -> Labelled:
    """The value that a layer contracts over an axis for each position of the others.

    A factor that varies along the axis and along others, too, says of each channel where it lies on both. The weights
    are the same at all positions, so either the channels lie along the axis, or (where the others tell more of them
    apart: class tokens of several scales that are weighed) along the others, and are the same all along the axis.
    """
    axis %= len(x.shape)
    factors = []
    for factor in x.factors:
        others = sorted(varying(factor) - {axis})
        if axis in varying(factor) and others:
            along_others, along_axis = factor.amax(axis, keepdim=True), factor.amax(others)
            if len(along_others.unique()) > len(along_axis.unique()):
                ctx.graph.unite(factor, along_others)
                factor = along_others
        factors.append(factor)
    return replace(x, factors=tuple(factors), versions=())


@register_rule(nn.Linear, kind="layer", linear=weights.dense, fresh=True)
def linear_module(ctx: RuleContext, module: nn.Linear, input: Labelled) -> Labelled:
    """Y = x Wᵀ + b over the last axis."""
    return linear(ctx, input, _weight(ctx), ctx.own("bias"))


@register_rule("linear", kind="layer", linear=weights.dense, fresh=True)
def linear(ctx: RuleContext, input: Labelled, weight: Labelled, bias: Any = None) -> Labelled:
    """Y = x Wᵀ + b over the last axis."""
    name, (rows, columns) = _name(weight), weight.shape
    input = _settled(ctx, ctx.graph.opened(input), -1)
    _contract(ctx, input, -1, ctx.graph.axis(name, 1, columns, "contract"))
    out = ctx.graph.axis(name, 0, rows, "produce")
    last = len(input.shape) - 1
    kept = [f for f in input.factors if last not in varying(f)]
    factor = out.reshape((1,) * last + (-1,))
    return _with_bias(ctx, Labelled((*input.shape[:-1], rows), (*kept, factor)), bias, last)


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, kind="layer", linear=weights.convolution, fresh=True)
def conv_module(ctx: RuleContext, module: Any, input: Labelled) -> Labelled:
    """Convolution over channels (axis 1) and neighbouring pixels."""
    return _conv(ctx, input, _weight(ctx), ctx.own("bias"), module.groups, module.stride)


@register_rule("conv1d", "conv2d", "conv3d", kind="layer", linear=weights.convolution, fresh=True)
def conv(
    ctx: RuleContext, input: Labelled, weight: Labelled, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Labelled:  # fmt: skip
    """Convolution over channels (axis 1) and neighbouring pixels."""
    return _conv(ctx, input, weight, bias, groups, stride)


@register_rule(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, kind="layer", linear=weights.transposed_convolution,
    fresh=True,
)  # fmt: skip
def conv_transpose_module(ctx: RuleContext, module: Any, input: Labelled, output_size: Any = None) -> Labelled:
    """Transposed convolution: the weight's axis 0 is the input's channels."""
    return _conv_transpose(ctx, input, _weight(ctx), ctx.own("bias"), module.groups)


@register_rule(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", kind="layer", linear=weights.transposed_convolution,
    fresh=True,
)  # fmt: skip
def conv_transpose(
    ctx: RuleContext, input: Labelled, weight: Labelled, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Labelled:  # fmt: skip
    """Transposed convolution: the weight's axis 0 is the input's channels."""
    return _conv_transpose(ctx, input, weight, bias, groups)


def _conv(ctx: RuleContext, x: Labelled, weight: Labelled, bias: Any, groups: int, stride: Any) -> Labelled:
    name, (rows, columns) = _name(weight), weight.shape[:2]
    out, x = ctx.graph.axis(name, 0, rows, "produce"), ctx.graph.opened(x)
    if groups == 1:
        x = _settled(ctx, x, 1) if all(size == 1 for size in weight.shape[2:]) else x
        _contract(ctx, x, 1, ctx.graph.axis(name, 1, columns, "contract"))
    else:
        inside = _grouped_inputs(ctx, x, name, groups, rows, columns)
        _nest_groups(ctx, inside, out.reshape(groups, -1))
    kept = _off_channels(ctx, x, weight.shape[2:], stride)
    return _with_bias(ctx, _result(ctx, kept, out), bias, 1)


def _conv_transpose(ctx: RuleContext, x: Labelled, weight: Labelled, bias: Any, groups: int) -> Labelled:
    (name, (rows, columns)), x = (_name(weight), weight.shape[:2]), ctx.graph.opened(x)
    kept = _off_channels(ctx, x, weight.shape[2:], 2)
    if groups == 1:
        _contract(ctx, x, 1, ctx.graph.axis(name, 0, rows, "contract"))
        out = ctx.graph.axis(name, 1, columns, "produce")
    elif groups == rows:  # depthwise: an input channel is a block of output channels, and produces them
        inside = ctx.graph.axis(name, 0, rows, "produce")
        _contract(ctx, x, 1, inside)
        out = _grouped_outputs(ctx, name, groups, rows, columns)
        _nest_groups(ctx, inside.reshape(groups, 1), out)
    else:
        inside = ctx.graph.axis(name, 0, rows, "contract")
        _contract(ctx, x, 1, inside)
        out = _grouped_outputs(ctx, name, groups, rows, columns)
        _nest_groups(ctx, inside.reshape(groups, -1), out)
    return _with_bias(ctx, _result(ctx, kept, out.reshape(-1)), bias, 1)


def _result(ctx: RuleContext, kept: list[torch.Tensor], out: torch.Tensor) -> Labelled:
    factor = out.reshape((1, -1) + (1,) * (len(ctx.shape) - 2))
    return Labelled(ctx.shape, (*kept, factor))


def _off_channels(ctx: RuleContext, x: Labelled, kernel: Any, stride: Any) -> list[torch.Tensor]:
    """The factors that pass a convolution: those that vary over neither channels nor mixed pixels."""
    pointwise = all(k == 1 for k in kernel) and all(s == 1 for s in ([stride] if isinstance(stride, int) else stride))
    pixels = [] if pointwise else range(2, len(x.shape))
    reason = f"{ctx.name} depends on the order of channels"
    kept = [mixed(ctx.graph, f, pixels, reason) for f in x.factors if 1 not in varying(f)]
    return [f for f in kept if f is not None]


def _grouped_inputs(ctx: RuleContext, x: Labelled, name: str, groups: int, rows: int, columns: int) -> torch.Tensor:
    """The input's labels by group (groups × columns), tied to the weight's columns."""
    labels = along(ctx.graph, x, 1)
    if columns == 1:
        if labels is None:  # each group reads its own part of an input whose order cannot change
            labels = ctx.graph.fresh(groups)
            ctx.graph.freeze(labels, "position")
        return labels.reshape(groups, 1)
    row = torch.arange(rows).reshape(groups, -1)
    inside = ctx.graph.grouped_axis(name, row, columns, "contract")
    _contract(ctx, x, 1, inside)
    return inside


def _grouped_outputs(ctx: RuleContext, name: str, groups: int, rows: int, columns: int) -> torch.Tensor:
    """The labels (groups × columns) that a grouped transposed convolution produces."""
    if columns == 1:
        return ctx.graph.axis(name, 0, rows, "produce").reshape(groups, -1)
    row = torch.arange(rows).reshape(groups, -1)
    return ctx.graph.grouped_axis(name, row, columns, "produce")


def _nest_groups(ctx: RuleContext, inside: torch.Tensor, outside: torch.Tensor) -> None:
    """Tie the inputs and the outputs of each group: where a side is one channel, it is the block itself."""
    graph, relation = ctx.graph, f"{ctx.name}:groups"
    if inside.shape[1] == outside.shape[1] == 1:
        graph.unite(inside, outside)
    elif inside.shape[1] == 1:
        blocks = graph.fresh(len(inside), 1)  # of their own: several groups may read one channel
        graph.unite(blocks, inside)
        graph.nest(relation, outside, blocks)
    elif outside.shape[1] == 1:
        graph.nest(relation, inside, outside)
    else:
        blocks = graph.fresh(len(inside), 1)
        graph.nest(relation, inside, blocks)
        graph.nest(relation, outside, blocks)


def _inserted(value: Labelled, axis: int) -> Labelled:
    """The value with a new axis of size 1."""
    axis %= len(value.shape) + 1
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    return Labelled(shape, tuple(f.unsqueeze(axis) for f in value.factors), value.parameter, value.uniform)


def _contracted_by(ctx: RuleContext, value: Labelled, axis: int) -> None:
    """A parameter that is an operand is contracted along that axis."""
    if value.parameter is not None:
        ctx.graph.contract(value.parameter, axis % len(value.shape))


@register_rule("matmul", "bmm", "mm", kind="layer", linear=weights.matrix_product, joint=jointly.multiplies)
def matmul(ctx: RuleContext, input: Any, other: Any) -> Labelled:
    """A product summed over the inner axis: the operands meet there, then it is reduced."""
    x, y = ctx.graph.opened(as_labelled(input)), ctx.graph.opened(as_labelled(other))
    if min(len(x.shape), len(y.shape)) < 2:
        raise Unsupported("a product with a vector")
    _contracted_by(ctx, x, -1)
    _contracted_by(ctx, y, -2)
    product = meet(ctx.graph, ctx.name, _inserted(x, -1), _inserted(y, -3))
    weighted = x.parameter is not None or y.parameter is not None
    return reduce(ctx.graph, ctx.name, product, [-2], weighted=weighted, product=True)


@register_rule("einsum", kind="layer", linear=weights.einsum_product, joint=jointly.multiplies)
def einsum(ctx: RuleContext, equation: str, *operands: Any) -> Labelled:
    """A product over named axes: operands meet, then what is not in the result is reduced."""
    values = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in terms):
        raise Unsupported("an einsum with an ellipsis, a diagonal or an implicit result")
    order = right + "".join(dict.fromkeys(s for t in terms for s in t if s not in right))
    product: Labelled | None = None
    weighted = False
    for term, raw in zip(terms, values, strict=True):
        value = ctx.graph.opened(as_labelled(raw))
        weighted |= value.parameter is not None and set(order[len(right) :]) <= set(term)
        for axis, letter in enumerate(term):
            if letter not in right:
                _contracted_by(ctx, value, axis)
        spread = _arranged(value, term, order)
        product = spread if product is None else meet(ctx.graph, ctx.name, product, spread)
    assert product is not None
    gone = list(range(len(right), len(order)))
    return reduce(ctx.graph, ctx.name, product, gone, weighted=weighted, product=True) if gone else product


def _arranged(value: Labelled, term: str, order: str) -> Labelled:
    """The value with one axis for each letter of ``order``."""
    here = [term.index(s) for s in order if s in term]
    where = [i for i, s in enumerate(order) if s in term]

    def lay(shape: tuple[int, ...]) -> tuple[int, ...]:
        full = [1] * len(order)
        for axis, i in zip(here, where, strict=True):
            full[i] = shape[axis]
        return tuple(full)

    factors = tuple(f.permute(here).reshape(lay(tuple(f.shape))) for f in value.factors)
    return Labelled(lay(value.shape), factors, uniform=value.uniform)


@register_rule(nn.Embedding, kind="layer", joint=jointly.moves)
def embedding_module(ctx: RuleContext, module: nn.Embedding, x: Any) -> Labelled:
    """Rows of a table: the vocabulary is fixed, the columns are channels."""
    return embedding(ctx, x, _weight(ctx))


@register_rule("embedding", kind="layer", joint=jointly.moves)
def embedding(ctx: RuleContext, input: Any, weight: Labelled, *args: Any, **kwargs: Any) -> Labelled:
    """Rows of a table: the vocabulary is fixed, the columns are channels."""
    if not (isinstance(weight, Labelled) and weight.parameter):
        input, weight = weight, input
    name = _name(weight)
    ctx.graph.freeze(ctx.graph.axis(name, 0, weight.shape[0], "produce"), "position")
    columns = ctx.graph.axis(name, 1, weight.shape[1], "produce")
    return Labelled(ctx.shape, (columns.reshape((1,) * (len(ctx.shape) - 1) + (-1,)),))
