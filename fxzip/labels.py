"""Labels: what the analysis knows of a tensor, and what must hold between labels.

Every channel has an integer label. A tensor carries *factors*: label tensors of the tensor's rank, of size 1 on
the axes that the labels do not depend on. An axis of a tensor along which no factor varies is *positional*:
its indices mean something by themselves (pixels, tokens, colours, classes) and may not be permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxzip.channels import Role

VOID = 0
"""The label of a uniform constant, padding for one: it says nothing and ties nothing."""
FIXED = 1
"""The label of an element that must stay where it is."""
FIRST = 2
"""The first label that names a channel."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A tensor as the analysis sees it.

    Attributes:
        shape: Its sizes, batch 1.
        factors: Label tensors, each of rank ``len(shape)`` and of size 1 or ``shape[axis]`` on each axis.
        parameter: Qualified name, if it is a parameter or buffer itself.
        uniform: All elements are known to be equal (zeros, ones).
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, ...] = ()
    parameter: str | None = None
    uniform: bool = False


def varying(factor: Tensor) -> frozenset[int]:
    """The axes along which the labels of a factor vary."""
    return frozenset(axis for axis, size in enumerate(factor.shape) if size > 1)


def compress(labels: Tensor) -> Tensor | None:
    """Shrink to size 1 every axis along which labels do not vary; None if nothing is labelled at all.

    `VOID` agrees with every label, so that zero padding of pixels leaves a factor as it is.
    """
    if labels.numel() == 0:
        return None
    for axis in range(labels.dim()):
        if labels.shape[axis] == 1:
            continue
        top = labels.amax(axis, keepdim=True)
        if bool(((labels == top) | (labels == VOID)).all()):
            labels = top
    if labels.numel() == 1 and int(labels) <= FIXED:
        return None
    return None if bool((labels == VOID).all()) else labels.contiguous()


def aligned(value: Labelled, rank: int) -> Labelled:
    """The value with leading axes of size 1, as broadcasting adds them."""
    lead = (1,) * (rank - len(value.shape))
    return Labelled(
        lead + tuple(value.shape),
        tuple(f.reshape(lead + tuple(f.shape)) for f in value.factors),
        value.parameter,
        value.uniform,
    )


@dataclass(eq=False)
class ParameterAxis:
    """The labels along one axis of a parameter; of shape (blocks, n) where they depend on ``rows``."""

    parameter: str
    axis: int
    labels: Tensor
    role: Role
    rows: Tensor | None = None


@dataclass(eq=False)
class LabelGraph:
    """All labels of a network, and what was found to hold between them.

    Attributes:
        axes: Labels along the axes of parameters, by (parameter, axis).
        edges: Pairs of labels that are one channel.
        parents: (relation, child labels, block labels): children move with their block.
        frozen: (labels, reason): labels that may not be permuted.
        uses: (node, labels): labels that a node treats as one set (a norm, an activation, a mean).
        aliases: The one name to use for a parameter that has several.
    """

    axes: dict[tuple[str, int], ParameterAxis] = field(default_factory=dict)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    parents: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    uses: list[tuple[str, Tensor]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    count: int = FIRST

    def fresh(self, *shape: int) -> Tensor:
        """New labels, int64 of the given shape."""
        n = int(torch.Size(shape).numel())
        labels = torch.arange(self.count, self.count + n).reshape(shape)
        self.count += n
        return labels

    def unite(self, left: Tensor, right: Tensor, reason: str = "position") -> None:
        """Labels that meet at one position (after broadcasting) are one channel."""
        left, right = (t.reshape(-1) for t in torch.broadcast_tensors(left, right))
        both = (left >= FIRST) & (right >= FIRST)
        self.edges.append((left[both], right[both]))
        self.freeze(left[(left >= FIRST) & (right == FIXED)], reason)
        self.freeze(right[(right >= FIRST) & (left == FIXED)], reason)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These labels may not be permuted, and why."""
        labels = labels[labels >= FIRST].unique()
        if labels.numel():
            self.frozen.append((labels, reason))

    def use(self, node: str, labels: Tensor) -> None:
        """A node treats these labels as one set: they can be permuted among themselves only."""
        labels = labels[labels >= FIRST].unique()
        if labels.numel():
            self.uses.append((node, labels))

    def nest(self, relation: str, children: Tensor, blocks: Tensor) -> None:
        """Children move with their block (after broadcasting); a `FIXED` block does not move."""
        children, blocks = (t.reshape(-1) for t in torch.broadcast_tensors(children, blocks))
        keep = (children >= FIRST) & (blocks != VOID)
        children, blocks = children[keep], blocks[keep].clone()
        fixed = blocks == FIXED
        if bool(fixed.any()):
            blocks[fixed] = anchor = self.fresh(1)
            self.freeze(anchor, "position")
        if children.numel():
            self.parents.append((relation, children, blocks))

    def axis(self, parameter: str, axis: int, size: int, role: Role) -> Tensor:
        """The labels along an axis of a parameter: the same ones each time that it is used."""
        key = (self.aliases.get(parameter, parameter), axis)
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, self.fresh(size), role)
        return self.axes[key].labels

    def grouped_axis(self, parameter: str, rows: Tensor, size: int, role: Role) -> Tensor:
        """The labels (groups × size) that lie along axis 1 in ``rows`` (groups × rows of a group)."""
        key = (self.aliases.get(parameter, parameter), 1)
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, self.fresh(len(rows), size), role, rows)
        return self.axes[key].labels

    def parameter(self, name: str, shape: Sequence[int]) -> Labelled:
        """A parameter as a value: labels of its own along each of its axes."""
        factors = []
        for axis, size in enumerate(shape):
            if size > 1:
                labels = self.axis(name, axis, size, "produce")
                if labels.dim() == 1:
                    factors.append(labels.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
        return Labelled(tuple(shape), tuple(factors), parameter=name)

    def opened(self, value: Labelled) -> Labelled:
        """A parameter used as a value gets labels on its axes; anything else stays as it is."""
        if value.parameter is None or value.factors:
            return value
        return self.parameter(value.parameter, value.shape)


def collapse(graph: LabelGraph, factor: Tensor, axis: int) -> Tensor:
    """Tie labels that differ only off ``axis``; labels of shape (size,) along it."""
    flat = factor.movedim(axis, 0).reshape(factor.shape[axis], -1)
    known = flat.amax(1)
    if flat.shape[1] > 1:
        graph.unite(flat, known[:, None])
    return known


def along(graph: LabelGraph, value: Labelled, axis: int) -> Tensor | None:
    """The labels (size,) of a value along one axis, tied over the others; None if the axis is positional."""
    axis %= len(value.shape)
    found = [collapse(graph, f, axis) for f in value.factors if f.shape[axis] > 1]
    for other in found[1:]:
        graph.unite(found[0], other)
    return found[0] if found else None


def mixed(graph: LabelGraph, factor: Tensor, axes: Sequence[int], reason: str) -> Tensor | None:
    """What is left of a factor when positions along ``axes`` are mixed (by a kernel, by a resize).

    Labels that differ along those axes only (subpixels of a channel, after a pixel shuffle) are tied; where
    nothing else tells channels apart, their order matters and they are frozen: None.
    """
    moved = varying(factor) & set(axes)
    if not moved:
        return factor
    if varying(factor) <= moved:
        graph.freeze(factor, reason)
        return None
    known = factor.amax(sorted(moved), keepdim=True)
    graph.unite(factor, known)
    return known


def meet(graph: LabelGraph, node: str, x: Labelled, y: Labelled) -> Labelled:
    """An elementwise operation of two tensors with broadcasting: labels met at one position are united."""
    x, y = graph.opened(x), graph.opened(y)
    rank = max(len(x.shape), len(y.shape))
    x, y = aligned(x, rank), aligned(y, rank)
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    if x.uniform or y.uniform:
        both = x.uniform and y.uniform
        return Labelled(shape, (y if x.uniform else x).factors, uniform=both)
    _respect_positions(graph, node, x, y)
    _respect_positions(graph, node, y, x)
    left, right, kept = list(x.factors), list(y.factors), []
    for f in x.factors:
        twin = next((g for g in right if varying(g) == varying(f)), None)
        if twin is not None:
            graph.unite(f, twin)
            kept.append(twin if x.parameter else f)
            left = [other for other in left if other is not f]
            right = [other for other in right if other is not twin]
    for f in list(left):
        for g in [g for g in y.factors if varying(f) & varying(g)]:
            coarser = _tie(graph, node, (x.shape, f), (y.shape, g))
            left = [h for h in left if h is not coarser]
            right = [h for h in right if h is not coarser]
    for g in list(right):
        for f in [f for f in kept if varying(f) & varying(g)]:
            if _tie(graph, node, (x.shape, f), (y.shape, g)) is g:
                right = [h for h in right if h is not g]
    return Labelled(shape, tuple(kept + left + right))


def _respect_positions(graph: LabelGraph, node: str, x: Labelled, y: Labelled) -> None:
    """Labels of ``x`` along an axis on which ``y`` is positional may not be permuted."""
    seen: frozenset[int] = frozenset().union(*(varying(g) for g in y.factors))
    for f in x.factors:
        if any(y.shape[axis] > 1 and axis not in seen for axis in varying(f)):
            graph.freeze(f, f"meets fixed positions at {node}")


def _tie(
    graph: LabelGraph, node: str, x: tuple[Sequence[int], Tensor], y: tuple[Sequence[int], Tensor]
) -> Tensor | None:
    """Tie two factors that vary along some common axes; returns the factor that the other makes redundant."""
    (x_shape, f), (y_shape, g) = x, y
    axes = varying(f) | varying(g)
    on_x = {a for a in axes if x_shape[a] > 1}
    on_y = {a for a in axes if y_shape[a] > 1}
    if on_y < on_x and varying(g) < varying(f) and not varying(f) <= on_y:
        graph.nest(f"{node}:broadcast", f, g)
        return g
    if on_x < on_y and varying(f) < varying(g) and not varying(g) <= on_x:
        graph.nest(f"{node}:broadcast", g, f)
        return f
    common = varying(f) & varying(g)
    if on_x - on_y and on_y - on_x:
        blocks = graph.fresh(*(f.shape[a] if a in common else 1 for a in range(f.dim())))
        graph.nest(f"{node}:outer", f, blocks)
        graph.nest(f"{node}:outer", g, blocks)
        return None
    graph.unite(f, g)
    return g if varying(f) <= varying(g) else f if varying(g) <= varying(f) else None


def reduce(graph: LabelGraph, node: str, value: Labelled, axes: Sequence[int], keepdim: bool = False) -> Labelled:
    """Take a symmetric function (sum, mean, maximum, norm) over axes.

    Where labels vary along other axes too, what is left is labelled by block: the channels that were reduced
    together move together.
    """
    value = graph.opened(value)
    rank = len(value.shape)
    gone = {axis % rank for axis in axes}
    factors = []
    for f in value.factors:
        if varying(f) & gone:
            graph.use(node, f)
            if varying(f) <= gone:
                continue
            blocks = graph.fresh(*(1 if a in gone else size for a, size in enumerate(f.shape)))
            graph.nest(f"{node}:reduce", f, blocks)
            f = blocks
        factors.append(f)
    shape = tuple(1 if a in gone else size for a, size in enumerate(value.shape))
    if not keepdim:
        shape = tuple(size for a, size in enumerate(shape) if a not in gone)
        factors = [f.reshape([size for a, size in enumerate(f.shape) if a not in gone]) for f in factors]
    return Labelled(shape, tuple(factors), uniform=value.uniform)
