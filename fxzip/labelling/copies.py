"""Which copies of a channel correspond to which of another's.

A class may hold several labels of one axis: pixels of a channel on a flattened axis, channels that were added to other
channels of the same layer. Equal colours of such classes do not tell how their labels correspond. So the labels
themselves are coloured, by the places where they touch parameters and by the labels that they met; where two labels of
a class look alike still, one is singled out (in every class alike), until all differ. Labels of one colour correspond
then: each pair that met in one class met in the other, in the same place (McKay and Piperno, "Practical graph
isomorphism, II", 2014, section 2: an equitable partition whose cells meet each component once is an isomorphism).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxzip.labelling.labels import FIRST, LabelGraph

Ints = NDArray[np.int64]
_ROUNDS = 64
"""Most rounds in which a label is singled out; labels that still look alike after them count as different."""


@dataclass(eq=False)
class Copies:
    """The labels of the classes that hold several labels of one origin.

    Attributes:
        labels: Them, in ascending order; (n,).
        classes: The class of each; (n,).
        marks: For each its marks, summed; (n,).
        ends: Pairs of them that met, as numbers of labels; (pairs, 2).
        kinds: Where each pair met; (pairs,).
        inside: Labels that lie in blocks, and the label and the class of the block; (pairs, 3).
        relations: The number of each pair's relation; (pairs,).
        held: Classes of which labels lie in blocks that are among the labels, the block's label, and the relation;
            (pairs, 3).
    """

    labels: Ints
    classes: Ints
    marks: Ints
    ends: Ints
    kinds: Ints
    inside: Ints
    relations: Ints
    held: Ints

    @classmethod
    def of(cls, graph: LabelGraph, of: Ints, labels: Ints, marks: Sequence[tuple[Ints, Ints]]) -> Copies:
        """From a graph; ``labels`` are `ambiguous` ones, ``marks`` are (labels, keys)."""
        number = np.full(len(of), -1)
        number[labels] = np.arange(len(labels))
        total = np.zeros(len(labels), dtype=np.int64)
        for owners, keys in marks if len(labels) else ():
            here = number[owners]
            np.add.at(total, here[here >= 0], scrambled(keys[here >= 0]))
        ends, kinds = _meetings(graph, number)
        inside, relations, held = _insides(graph, of, number)
        return cls(labels, of[labels], total, ends, kinds, inside, relations, held)

    def label_colours(self, of_class: Ints) -> Ints:
        """A colour for each label, given the colours of all classes: no two labels of a class have the same."""
        marks = self.marks + scrambled(of_class[self.classes])
        child, block, relation = self.held.T
        np.add.at(marks, block, scrambled(of_class[child] ^ scrambled(relation)))
        colour = self._refined(marks, of_class)
        for _ in range(_ROUNDS):
            alike = self._alike(colour)
            if not len(alike):
                return colour
            colour = colour.copy()
            colour[alike] = scrambled(colour[alike] + 1)
            colour = self._refined(colour, of_class)
        alike = self._alike(colour, all_of_them=True)
        colour[alike] = scrambled(colour[alike] + self.labels[alike])
        return colour

    def by_block(self, by_label: Ints) -> tuple[Ints, Ints]:
        """Marks of classes: which copy of a block, by the colours of labels, what is in it lies in."""
        child, block, relation = self.held.T
        return child, by_label[block] ^ scrambled(relation)

    def _alike(self, colour: Ints, all_of_them: bool = False) -> Ints:
        """The first label, in each class that has two of one colour, of those that have; or all such labels."""
        order = np.lexsort((self.labels, colour, self.classes))
        same = (np.diff(colour[order]) == 0) & (np.diff(self.classes[order]) == 0)
        found = order[np.flatnonzero(same)]
        return found if all_of_them else found[np.unique(self.classes[found], return_index=True)[1]]

    def _refined(self, colour: Ints, of_class: Ints) -> Ints:
        count = -1
        while (new := len(np.unique(colour))) > count:
            count, total = new, scrambled(colour)
            for side in (0, 1):
                here, there = self.ends[:, side], self.ends[:, 1 - side]
                np.add.at(total, here, scrambled(colour[there] ^ (2 * self.kinds + side)))
            child, block, block_class = self.inside.T
            around = np.where(block >= 0, colour[block] if len(colour) else block, of_class[block_class])
            np.add.at(total, child, scrambled(around ^ scrambled(self.relations)))
            colour = total
        return colour


def ambiguous(graph: LabelGraph, of: Ints, free: NDArray[np.bool_]) -> Ints:
    """The labels of the classes that hold several labels of one origin, and may move; ``free`` says which do."""
    begins = np.array(graph.origins, dtype=np.int64)
    origin = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(of)))
    keys = np.sort(of[FIRST:] * max(len(begins), 1) + origin)
    twice = np.unique(keys[1:][keys[1:] == keys[:-1]] // max(len(begins), 1))
    several = np.zeros(len(free), dtype=bool)
    several[twice] = True
    return FIRST + np.flatnonzero((several & free)[of[FIRST:]])


def _meetings(graph: LabelGraph, number: Ints) -> tuple[Ints, Ints]:
    """The pairs of labels, by number, that met, and for each where, and as which of their copies there."""
    left, right = (side.numpy() for side in graph.meetings()[:2])
    if not (number >= 0).any():
        left = right = left[:0]
    here = np.flatnonzero((number[left] >= 0) & (number[right] >= 0))
    call = np.searchsorted(np.cumsum(graph.meetings()[2]), here, side="right")
    ends = np.stack([number[left[here]], number[right[here]]], 1)
    ranks = [occurrences(call * len(number) + ends[:, side]) for side in (0, 1)]
    return ends, scrambled(scrambled(scrambled(call) + ranks[0]) + ranks[1])


def _insides(graph: LabelGraph, of: Ints, number: Ints) -> tuple[Ints, Ints, Ints]:
    found, held, relations = [np.zeros((0, 3), dtype=np.int64)], [np.zeros((0, 3), dtype=np.int64)], []
    known: dict[str, int] = {}
    for relation, children, blocks in graph.parents if (number >= 0).any() else ():
        inside, around = children.numpy(), blocks.numpy()
        this = known.setdefault(relation, len(known))
        here = number[inside] >= 0
        found.append(np.stack([number[inside], number[around], of[around]], 1)[here])
        relations += [this] * int(here.sum())
        here = number[around] >= 0
        held.append(np.stack([of[inside], number[around], np.full(len(inside), this)], 1)[here])
    return np.concatenate(found), np.array(relations, dtype=np.int64), np.unique(np.concatenate(held), axis=0)


def occurrences(keys: Ints) -> Ints:
    """For each element how many like it come before it."""
    order = np.argsort(keys, kind="stable")
    start = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] - 1))
    ranks = np.empty_like(keys)
    ranks[order] = np.arange(len(keys)) - np.repeat(start, np.diff(start, append=len(keys)))
    return ranks


def scrambled(keys: Ints, seed: int = 0x9E3779B97F4A7C15) -> Ints:
    """A number for each key that looks random: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = keys.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)
