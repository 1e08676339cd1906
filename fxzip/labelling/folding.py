"""Axes that are taken together, mixed or reduced: what becomes of the labels along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxzip.labelling.labels import FIRST, FIXED, VOID, LabelGraph, Labelled, varying


def collapse(graph: LabelGraph, factor: Tensor, axis: int) -> Tensor:
    """Tie labels that differ only off ``axis``; labels of shape (size,) along it."""
    flat = factor.movedim(axis, 0).reshape(factor.shape[axis], -1)
    known = flat.amax(1)
    if flat.shape[1] > 1:
        graph.unite(flat, known[:, None])
    return known


def along(graph: LabelGraph, value: Labelled, axis: int) -> Tensor | None:
    """The labels (size,) of a value along one axis, tied over the others; None if the axis is positional.

    Where the axis is a product (heads by channels of a head, each with labels of its own), its elements get labels
    of their own, which move with both.
    """
    axis %= len(value.shape)
    found = [collapse(graph, f, axis) for f in value.factors if f.shape[axis] > 1]
    found = [f for f in _without_redundant(graph, found) if bool((f != VOID).any())]
    if len(found) < 2:
        return found[0] if found else None
    labels = graph.fresh(value.shape[axis])
    for other in found:
        graph.nest(graph.relation("product"), labels, other)
    _, which = torch.stack(found, 1).unique(dim=0, return_inverse=True)
    graph.place(f"{graph.node}:product", labels, occurrences(which))  # of one product each is a position of its own
    return labels


def simplified(graph: LabelGraph, value: Labelled) -> Labelled:
    """The value without the factors that another factor of it determines; what moves with what is noted."""
    if len(value.factors) < 2:
        return value
    factors = tuple(_without_redundant(graph, list(value.factors)))
    return replace(value, factors=factors, versions=tuple(value.version(f) for f in factors))


def _without_redundant(graph: LabelGraph, factors: list[Tensor]) -> list[Tensor]:
    for coarse in sorted(factors, key=lambda f: f.numel()):
        for fine in factors:
            if fine is not coarse and varying(coarse) <= varying(fine) and determines(fine, coarse):
                if varying(coarse) == varying(fine) and determines(coarse, fine):
                    graph.unite(fine, coarse)
                else:
                    graph.nest(f"within:{int(fine.amax())}:{int(coarse.amax())}", fine, coarse)
                factors = [f for f in factors if f is not coarse]
                break
    return factors


def determines(fine: Tensor, coarse: Tensor) -> bool:
    """Whether equal labels of the one always come with equal labels of the other."""
    fine, coarse = (t.reshape(-1) for t in torch.broadcast_tensors(fine, coarse))
    place = fine - fine.amin()
    one = torch.empty(int(place.amax()) + 1, dtype=coarse.dtype).index_put_((place,), coarse)
    return torch.equal(one[place], coarse)


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


def reduce(
    graph: LabelGraph, node: str, value: Labelled, axes: Sequence[int], keepdim: bool = False, weighted: bool = False,
    product: bool = False,
) -> Labelled:  # fmt: skip
    """Take a symmetric function (sum, mean, maximum, norm) over axes.

    Where labels vary along other axes too, what is left is labelled by block: the channels that were reduced
    together move together.

    Args:
        graph: The labels.
        node: What takes it.
        value: Its input.
        axes: What it is taken over.
        keepdim: Whether they stay, with size 1.
        weighted: Whether it is a sum with a parameter's weights, which does not depend on how many channels there are.
        product: Whether it is the sum of a product: it matters then which summand an element is in.
    """
    value = graph.opened(value)
    rank = len(value.shape)
    gone = {axis % rank for axis in axes}
    factors = []
    for f in value.factors:
        if varying(f) & gone:
            graph.use(node, f)
            if not weighted:
                graph.summed.append((node, f, tuple(sorted(varying(f) & gone))))
            if varying(f) <= gone:
                continue
            blocks = _blocks(graph, f, sorted(varying(f) - gone), product)
            graph.nest(graph.relation(f"{node}:reduce"), f, blocks)
            first = sorted(varying(f) & gone)  # which summand it is tells elements apart, then where
            _place_in_rows(graph, node, *(t.movedim(first, list(range(len(first)))) for t in (f, blocks)))
            f = blocks
        factors.append(f)
    shape = tuple(1 if a in gone else size for a, size in enumerate(value.shape))
    if not keepdim:
        shape = tuple(size for a, size in enumerate(shape) if a not in gone)
        factors = [f.reshape([size for a, size in enumerate(f.shape) if a not in gone]) for f in factors]
    return Labelled(shape, tuple(factors), uniform=value.uniform)


def _blocks(graph: LabelGraph, factor: Tensor, axes: Sequence[int], ordered: bool) -> Tensor:
    """Labels for what is reduced together at each place along ``axes``; equal sets of labels are one block.

    ``ordered``: Only equal rows are, as each element has a factor of its own. A set with an element that must stay
    where it is is `FIXED` as a whole.
    """
    rows = factor.movedim(list(axes), list(range(len(axes))))
    rows = rows.reshape(int(torch.Size(rows.shape[: len(axes)]).numel()), -1)
    rows = rows if ordered else rows.sort(1).values
    distinct, number = torch.unique(rows, dim=0, return_inverse=True)
    free = (distinct > FIXED).any(1) & (distinct != FIXED).all(1)
    labels = torch.where((distinct == FIXED).any(1), FIXED, VOID)
    labels = labels.masked_scatter(free, graph.fresh(int(free.sum())))
    return labels[number].reshape([size if a in axes else 1 for a, size in enumerate(factor.shape)])


def _place_in_rows(graph: LabelGraph, node: str, factor: Tensor, blocks: Tensor) -> None:
    """Labels that are reduced in several rows are like others only that lie in the same rows, copy by copy.

    Where half of the tokens have their channels in reverse, the mean over tokens takes channel 0 of some and channel 9
    of the others, and in another row the other way round: both rows are of one block, but each is another sum.
    """
    row = torch.arange(blocks.numel()).reshape(blocks.shape)
    which = torch.stack([t.reshape(-1) for t in torch.broadcast_tensors(factor, blocks, row)])
    which = which[:, which[0] >= FIRST]
    owned, blocks_of = which[:2].unique(dim=1)[0].unique(return_counts=True)
    shared = owned[blocks_of > 1]
    apart = torch.isin(row.reshape(-1), which[2][torch.isin(which[0], shared)])  # rows of blocks that cannot move
    place = torch.where(apart, len(apart) + row.reshape(-1), occurrences(blocks.reshape(-1)))
    if not bool(place.any()):
        return
    label, order = which[0].sort(stable=True)
    copy, (known, number) = occurrences(label), label.unique(return_inverse=True)
    rows = torch.full((len(known), int(copy.max()) + 1), -1)
    rows[number, copy] = place[which[2][order]]
    graph.place(f"{node}:rows", known, rows.unique(dim=0, return_inverse=True)[1])


def occurrences(labels: Tensor) -> Tensor:
    """For each element how many like it come before it; (n,) of (n,)."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    start = torch.ones_like(ordered, dtype=torch.bool)
    start[1:] = ordered[1:] != ordered[:-1]
    place = torch.arange(len(labels))
    first = torch.where(start, place, 0).cummax(0).values if len(labels) else place
    return torch.empty_like(place).index_copy_(0, order, place - first)
