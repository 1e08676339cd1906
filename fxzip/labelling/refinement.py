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

from fxzip.labelling.copies import Copies
from fxzip.labelling.labels import LabelGraph

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
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
    marks, sets = _marks(graph, of)
    one_by_one = [(of[labels], keys) for labels, keys in marks]
    together = [_distinct(of, labels, keys) for labels, keys in sets]
    first = (frozen, -1 - frozen)
    colour = _stable(_recolour(count, [first, *one_by_one, *together]), nests)
    copies = Copies.of(graph, of, reason == 0, [*marks, *sets])
    while len(copies.labels):
        by_label = copies.label_colours(colour)
        new = _stable(_recolour(count, [(np.arange(count), colour), (copies.classes, by_label)]), nests)
        if new.max(initial=0) == colour.max(initial=0):
            break
        colour = new
    order = colour[of]
    if len(copies.labels):
        order = order * 0 + _numbered(order)
        order[copies.labels] = by_label
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


def _marks(graph: LabelGraph, of: Ints) -> tuple[list[tuple[Ints, Ints]], list[tuple[Ints, Ints]]]:
    """The marks of labels as (labels, keys): those that count each time, and those of sets, counted once a class."""
    kinds: dict[tuple[object, ...], int] = {}
    axes = list(graph.axes.values())
    numbers = [kinds.setdefault((axis.parameter, axis.axis), len(kinds)) for axis in axes]
    owners = [axis.labels.numpy().reshape(-1) for axis in axes]
    none = np.zeros(0, dtype=np.int64)
    keys = np.repeat(np.array(numbers, dtype=np.int64), [len(o) for o in owners])
    sets = []
    for node, labels in graph.uses:
        kind = kinds.setdefault((node,), len(kinds))
        sets.append((labels.numpy(), np.full(len(labels), kind)))
    fixed = [(node, labels.numpy(), where.numpy()) for node, labels, where in graph.places]
    for node, members, where in (*fixed, *_copies(graph, of)):
        kind = kinds.setdefault((node, "place"), len(kinds))
        sets.append((members, kind + ((where + 1) << 32)))
    return [(np.concatenate([none, *owners]), keys)], sets


def _distinct(of: Ints, labels: Ints, keys: Ints) -> tuple[Ints, Ints]:
    """The marks of a set by class, each once."""
    classes = of[labels]
    if len(keys) and (keys == keys[0]).all():
        found = np.unique(classes)
        return found, np.full(len(found), keys[0])
    found, which = np.unique(np.stack([classes, keys], 1), axis=0).T
    return found, which


def _copies(graph: LabelGraph, of: Ints) -> Iterator[tuple[str, Ints, Ints]]:
    """For relations in which a block has several copies: channels, and the number of the copy that each lies in.

    A channel of one copy of a block (a row of an attention map, say) never goes to another one.
    """
    found: dict[str, list[tuple[Ints, Ints]]] = {}
    for relation, children, blocks in graph.parents:
        found.setdefault(relation, []).append((children.numpy(), blocks.numpy()))
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
    high, low = (_sums(count, marks, np.uint64(seed)) for seed in _SEEDS)
    order = np.lexsort((low, high))
    new = (np.diff(high[order], prepend=high[order[:1]]) != 0) | (np.diff(low[order], prepend=low[order[:1]]) != 0)
    colour = np.empty(count, dtype=np.int64)
    colour[order] = np.cumsum(new)
    return colour


def _sums(count: int, marks: Sequence[tuple[Ints, Ints]], seed: np.uint64) -> Words:
    total = np.zeros(count, dtype=np.uint64)
    for classes, keys in marks:
        np.add.at(total, classes, _scrambled(keys, seed))
    return total


def _scrambled(keys: Ints, seed: np.uint64) -> Words:
    """A number for each key that looks random: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
