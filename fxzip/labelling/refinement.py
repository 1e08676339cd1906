"""Which classes of labels are interchangeable: colour refinement on the sites that they touch and their blocks.

A colour is a multiset of marks: a class has one for each place where it touches a parameter, for each node that treats
it as part of a set, and for each block that it lies in or holds. Multisets are compared by their hash, the sum of a
random number of 128 bits for each mark (Clarke et al., "Incremental multiset hash functions and their application to
memory integrity checking", ASIACRYPT 2003).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fxzip.labelling.copies import Copies, ambiguous, scrambled
from fxzip.labelling.labels import LabelGraph

Ints = NDArray[np.int64]
_SEEDS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


def colours(graph: LabelGraph, of: Ints, reason: Ints, nests: Mapping[str, Ints]) -> tuple[Ints, Ints]:
    """A colour for each class and each label, so that only interchangeable ones have the same.

    Args:
        graph: The labels, for the axes of parameters and for uses.
        of: The class of each label; (labels,).
        reason: For each class zero, or why it may not move: such a class is like no other; (classes,).
        nests: Pairs (child class, block class), of shape (pairs, 2), by relation.

    Returns:
        The colours of the classes, numbered by their first classes, and those of the labels: equal where labels of
        two classes of one colour correspond, in ascending order among the labels of a class.
    """
    count = len(reason)
    frozen = np.flatnonzero(reason)
    labels = ambiguous(graph, of, reason == 0)
    axes, sets = _axes(graph), _sets(graph, of, labels)
    first = (frozen, -1 - frozen)
    colour = _stable(_recolour(count, [first, (of[axes[0]], axes[1]), _by_class(of, *sets)]), nests)
    copies = Copies.of(graph, of, labels, [axes, sets[:2]])
    while len(labels):
        by_label = copies.label_colours(colour)
        marks = [(np.arange(count), colour), (copies.classes, by_label), copies.by_block(by_label)]
        finer = _recolour(count, marks)
        if finer.max(initial=0) == colour.max(initial=0):
            break
        colour = _stable(finer, nests)
    order = colour[of]
    if len(copies.labels):
        order[copies.labels] = by_label  # random numbers of 64 bits: none is that of a class
        order = _numbered(order)
    return _numbered(colour), order


def _numbered(colour: Ints) -> Ints:
    """The colours as numbers, in the order in which they come first."""
    _, begin, which = np.unique(colour, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(begin))[which]


def _stable(colour: Ints, nests: Mapping[str, Ints]) -> Ints:
    """The colours after those of blocks and of what lies in them have told apart what they can."""
    count = len(colour)
    while True:
        finer: list[tuple[Ints, Ints]] = [(np.arange(count), colour)]
        for number, (child, block) in enumerate(pairs.T for pairs in nests.values()):
            up, down = 2 * number + 1, 2 * number + 2
            finer.append((child, colour[block] + count * up))
            finer.append((block, colour[child] + count * down))
        new = _recolour(count, finer)
        if new.max(initial=0) == colour.max(initial=0):
            return new
        colour = new


def _axes(graph: LabelGraph) -> tuple[Ints, Ints]:
    """The labels along axes of parameters, and a number for the axis of each: the even ones."""
    owners = [axis.labels.numpy().reshape(-1) for axis in graph.axes.values()]
    numbers = 2 * np.arange(len(owners))
    return np.concatenate([np.zeros(0, dtype=np.int64), *owners]), np.repeat(numbers, [len(o) for o in owners])


def _sets(graph: LabelGraph, of: Ints, apart: Ints) -> tuple[Ints, Ints, Ints]:
    """The labels that nodes treat as one set or keep at places, odd numbers for these, and the number of the set."""
    fixed = [(node, labels.numpy(), where.numpy()) for node, labels, where in graph.places]
    placed = [*fixed, *_copies(graph, of, apart)]
    used = [(node, labels.numpy()) for node, labels in graph.uses]
    names = [*((node, "use") for node, _ in used), *((node, "place") for node, _, _ in placed)]
    numbers = {name: 2 * number + 1 for number, name in enumerate(dict.fromkeys(names))}
    kinds = [numbers[name] for name in names]
    members = [entry[1] for entry in (*used, *placed)]
    sizes = [len(m) for m in members]
    keys = np.repeat(np.array(kinds, dtype=np.int64), sizes)
    if placed:
        where = np.concatenate([w for _, _, w in placed])
        keys[len(keys) - len(where) :] += (where + 1) << 32
    return np.concatenate([np.zeros(0, dtype=np.int64), *members]), keys, np.repeat(np.arange(len(sizes)), sizes)


def _by_class(of: Ints, labels: Ints, keys: Ints, sets: Ints) -> tuple[Ints, Ints]:
    """The marks of sets by class, each once in a set."""
    width = int(sets.max(initial=0)) + 1
    plain = keys >> 32 == 0  # a set of one key each
    found, at = np.unique(of[labels[plain]] * width + sets[plain], return_index=True)
    classes, key = [found // width], [keys[plain][at]]
    if not plain.all():
        rest = np.stack([of[labels], sets, keys], 1)[~plain]
        distinct = rest[np.lexsort(rest.T)]
        distinct = distinct[np.r_[True, (np.diff(distinct, axis=0) != 0).any(1)]]
        classes.append(distinct[:, 0])
        key.append(distinct[:, 2])
    return np.concatenate(classes), np.concatenate(key)


def _copies(graph: LabelGraph, of: Ints, apart: Ints) -> Iterator[tuple[str, Ints, Ints]]:
    """For relations in which a block has several copies: channels, and the number of the copy that each lies in.

    A channel of one copy of a block (a row of an attention map, say) never goes to another one. Copies of different
    origins are numbered as these are; which of one origin correspond, `Copies` finds for the labels ``apart``.
    """
    found: dict[str, list[tuple[Ints, Ints]]] = {}
    named = np.zeros(len(of), dtype=bool)
    named[apart] = True
    for relation, children, blocks in graph.parents:
        inside, around = children.numpy(), blocks.numpy()
        plain = ~named[around]
        if plain.any():
            found.setdefault(relation, []).append((inside[plain], around[plain]))
    for relation, parts in found.items():
        inside, around = (np.concatenate(side) for side in zip(*parts, strict=True))
        known, at = np.unique(around, return_inverse=True)
        owner = of[known]
        order = np.lexsort((known, owner))
        start = np.flatnonzero(np.diff(owner[order], prepend=-1))
        if len(start) == len(known):
            continue
        rank = np.empty(len(known), dtype=np.int64)
        rank[order] = np.arange(len(known)) - np.repeat(start, np.diff(start, append=len(known)))
        yield relation, inside, rank[at]


def _recolour(count: int, marks: Sequence[tuple[Ints, Ints]]) -> Ints:
    """Number the classes by the multiset of marks that each has, given as (classes, keys)."""
    high, low = (_sums(count, marks, seed) for seed in _SEEDS)
    order = np.lexsort((low, high))
    new = (np.diff(high[order], prepend=high[order[:1]]) != 0) | (np.diff(low[order], prepend=low[order[:1]]) != 0)
    colour = np.empty(count, dtype=np.int64)
    colour[order] = np.cumsum(new)
    return colour


def _sums(count: int, marks: Sequence[tuple[Ints, Ints]], seed: int) -> Ints:
    total = np.zeros(count, dtype=np.int64)
    for classes, keys in marks:
        np.add.at(total, classes, scrambled(keys, seed))
    return total
