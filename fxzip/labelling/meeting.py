"""Where two labelled tensors meet in an elementwise operation: which labels are one channel, what moves with what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxzip.labelling.compress import compress
from fxzip.labelling.folding import determines
from fxzip.labelling.labels import VOID, LabelGraph, Labelled, aligned, in_place, varying


def meet(graph: LabelGraph, node: str, x: Labelled, y: Labelled) -> Labelled:
    """An elementwise operation of two tensors with broadcasting: labels met at one position are united."""
    x, y = graph.opened(x), graph.opened(y)
    rank = max(len(x.shape), len(y.shape))
    x, y = aligned(x, rank), aligned(y, rank)
    if any(a != b and a != 1 != b for a, b in zip(x.shape, y.shape, strict=True)):
        raise ValueError(f"shapes {x.shape} and {y.shape} do not broadcast")
    shape = tuple(b if a == 1 else a for a, b in zip(x.shape, y.shape, strict=True))
    if x.uniform or y.uniform:
        both = x.uniform and y.uniform
        return Labelled(shape, (y if x.uniform else x).factors, uniform=both)
    if len(x.factors) == len(y.factors) == 1 and x.factors[0].shape == y.factors[0].shape:  # as in most nodes
        graph.unite(x.factors[0], y.factors[0])
        first, second = (y, x) if x.parameter else (x, y)
        return Labelled(shape, _told_apart(graph, node, [_filled(first.factors[0], second.factors)], x, y))
    x, y = _at_repeats(graph, node, x, y), _at_repeats(graph, node, y, x)
    x, y = _at_positions(graph, node, x, y), _at_positions(graph, node, y, x)
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
            redundant = _tie(graph, node, (x, f), (y, g))
            left = [h for h in left if h is not redundant]
            right = [h for h in right if h is not redundant]
    for g in list(right):
        for f in [f for f in kept if varying(f) & varying(g)]:
            if _tie(graph, node, (x, f), (y, g)) is g:
                right = [h for h in right if h is not g]
    every = (*x.factors, *y.factors)
    kept = [_filled(f, every) for f in kept]
    kept += [_held(_filled(f, every), y) for f in left]
    kept += [_held(_filled(f, every), x) for f in right]
    return Labelled(shape, _told_apart(graph, node, kept, x, y))


def _told_apart(graph: LabelGraph, node: str, found: Sequence[Tensor], x: Labelled, y: Labelled) -> tuple[Tensor, ...]:
    """The factors of a result; channels that met a constant on the one side are not like those that did on the other.

    A gate of zeros is something else than zeros with a gate.
    """
    for side, operand in enumerate((x, y), 1):
        for known in (f for f in operand.factors if bool((f == VOID).any())):
            for factor in (f for f in found if varying(f) & varying(known)):
                graph.place(f"{node}:constants{side}", factor, (known == VOID).long())
    return tuple(found)


def _filled(factor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """A factor with the labels that others have where it has none: a sum with zeros is the other operand's channel."""
    for other in others:
        if other is factor or not varying(factor) & varying(other):
            continue
        void = factor == VOID
        if bool(void.any()):
            filled = compress(torch.where(void, other, factor))
            factor = factor if filled is None else filled
    return factor


def _held(factor: Tensor, other: Labelled) -> Tensor:
    """A factor whose uniform constants met values that differ by their positions: they are all alike no more."""
    seen: frozenset[int] = frozenset().union(*(varying(g) for g in other.factors))
    positional = any(size > 1 and axis not in seen for axis, size in enumerate(other.shape))
    return factor if seen & varying(factor) or not positional else in_place(factor)


def _at_positions(graph: LabelGraph, node: str, x: Labelled, y: Labelled) -> Labelled:
    """Labels of ``x`` along an axis on which ``y`` is positional stay at their place on it.

    A factor that varies along such axes only is frozen, and says no more of the result than its place does. One
    that varies along others too (heads by channels, met by the table of a rotary embedding) moves along those.
    """
    seen: frozenset[int] = frozenset().union(*(varying(g) for g in y.factors))
    kept = []
    for f in x.factors:
        fixed = [axis for axis in varying(f) if y.shape[axis] > 1 and axis not in seen]
        if varying(f) <= set(fixed) and fixed:
            graph.freeze(f, f"meets fixed positions at {node}")
            continue
        if fixed:
            graph.place(node, f, _slices(f, fixed))
        kept.append(f)
    return Labelled(x.shape, tuple(kept), x.parameter, x.uniform)


def _at_repeats(graph: LabelGraph, node: str, x: Labelled, y: Labelled) -> Labelled:
    """Labels of ``x`` that differ along an axis on which those of ``y`` repeat themselves stay where they are.

    So do the position embeddings of tokens, where a class token was put before the others: the tokens' channels
    are the same at all places but the first.
    """
    kept = []
    for f in x.factors:
        wider = [g for g in y.factors if varying(f) < varying(g)]
        alone = all(varying(f) < varying(g) or not varying(f) & varying(g) for g in y.factors)
        places = [_slices(g, sorted(varying(f))) for g in wider] if alone else []
        if any(not determines(place, f) for place in places):
            graph.freeze(f, f"meets fixed positions at {node}")
        else:
            kept.append(f)
    return Labelled(x.shape, tuple(kept), x.parameter, x.uniform)


def _slices(factor: Tensor, axes: Sequence[int]) -> Tensor:
    """Number the slices of a factor at each place along some axes, equal slices alike; of size 1 on the others."""
    rows = factor.movedim(list(axes), list(range(len(axes))))
    rows = rows.reshape(int(torch.Size(rows.shape[: len(axes)]).numel()), -1)
    number: Tensor = torch.unique(rows, dim=0, return_inverse=True)[1]
    return number.reshape([size if a in axes else 1 for a, size in enumerate(factor.shape)])


def _tie(graph: LabelGraph, node: str, left: tuple[Labelled, Tensor], right: tuple[Labelled, Tensor]) -> Tensor | None:
    """Tie two factors that vary along some common axes; returns the factor that the other makes redundant."""
    (x, f), (y, g) = left, right
    axes = varying(f) | varying(g)
    on_x = {a for a in axes if x.shape[a] > 1}
    on_y = {a for a in axes if y.shape[a] > 1}
    for fine, coarse, here, there in ((f, g, on_x, on_y), (g, f, on_y, on_x)):
        if there < here and varying(coarse) < varying(fine) and not varying(fine) <= there:
            if _repeats_itself(fine, varying(fine) - varying(coarse)):
                graph.unite(fine, coarse)
                return fine
            graph.nest(graph.relation(f"{node}:broadcast"), fine, coarse)
            return coarse
    common = varying(f) & varying(g)
    if on_x - on_y and on_y - on_x:
        blocks = graph.fresh(*(f.shape[a] if a in common else 1 for a in range(f.dim())))
        graph.nest(graph.relation(f"{node}:outer"), f, blocks)
        graph.nest(graph.relation(f"{node}:outer"), g, blocks)
        return None
    for fine, coarse, owner in ((f, g, y), (g, f, x)):
        if varying(coarse) < varying(fine):
            rest = varying(fine) - varying(coarse)
            apart = any(varying(other) & rest for other in owner.factors if other is not coarse)
            if apart and not _repeats_itself(fine, rest):
                graph.nest(graph.relation(f"{node}:product"), fine, coarse)
                return coarse
            graph.unite(fine, coarse)
            return fine
    graph.unite(f, g)
    return g if varying(f) == varying(g) else None


def _repeats_itself(factor: Tensor, axes: Iterable[int]) -> bool:
    """Whether some slices along these axes are alike (tokens, some of which have the same channels)."""
    places = _slices(factor, sorted(axes))
    return places.numel() > len(places.unique())
