"""Classes of labels: what was united, what may not move, and which blocks lie in which.

All steps are array operations over classes or over pairs of them, so that time grows with the number of labels and
not with that of Python objects.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxzip.labelling.labels import FIRST, FIXED, LabelGraph

Ints = NDArray[np.int64]
SILENT = ("input", "output", "position", "meets fixed")
"""Reasons that every network has: channels that are frozen for these get no line in the report."""
FREE, QUIET = 0, 1
"""Codes of classes that may move, and of those that may not for a silent reason; higher codes name a reason."""


@dataclass(eq=False)
class Classes:
    """Classes of labels, and what is known of each.

    Attributes:
        of: The class of each label; (labels,).
        reason: For each class `FREE`, `QUIET`, or the number of the reason why it may not move; (classes,).
        texts: The reasons by number.
        nests: Pairs (child class, block class), of shape (pairs, 2) and in ascending order, by relation.
    """

    of: Ints
    reason: Ints
    texts: list[str]
    nests: dict[str, Ints]

    @property
    def count(self) -> int:
        """The number of classes."""
        return len(self.reason)


def unite(graph: LabelGraph) -> Classes:
    """Resolve the unions, then let what is frozen keep in place what it moves with."""
    left, right = (side.numpy() for side in graph.meetings()[:2])
    known = np.minimum(left, right) >= FIRST
    of, count = _components(graph.count, left[known], right[known])
    reason, texts = np.full(count, FREE), ["", "position"]
    for one, other in ((left, right), (right, left)):
        reason[of[one[other == FIXED]]] = QUIET
    numbers: dict[str, int] = {}
    for labels, why in graph.frozen:
        classes = of[labels.numpy()]
        if why.startswith(SILENT):
            _keep(reason, classes)
        else:
            number = numbers.setdefault(why, len(texts))
            texts += [why] * (number == len(texts))
            reason[classes[reason[classes] <= QUIET]] = number
    reason[of[:FIRST]] = FREE
    pairs = defaultdict(list)
    for relation, children, blocks in graph.parents:
        pairs[relation].append((of[children.numpy()], of[blocks.numpy()]))
    nests = {relation: distinct(*map(np.concatenate, zip(*found, strict=True))) for relation, found in pairs.items()}
    return Classes(of, reason, texts, nests)


def _components(count: int, left: Ints, right: Ints) -> tuple[Ints, int]:
    """The class of each of ``count`` things of which pairs are tied, numbered by their first members."""
    matrix = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
    number, of = connected_components(matrix, directed=False)
    return of.astype(np.int64), int(number)


def distinct(left: Ints, right: Ints) -> Ints:
    """The distinct pairs in ascending order; (pairs, 2)."""
    width = int(right.max(initial=0)) + 1
    keys = np.unique(left * width + right)
    return np.stack([keys // width, keys % width], 1)


def freeze_blocks(classes: Classes) -> None:
    """A block with a channel that cannot move cannot move; nor can the blocks of a relation that share a channel."""
    _break_circles(classes)
    reason = classes.reason
    for pairs in classes.nests.values():
        child, times = np.unique(pairs[:, 0], return_counts=True)
        _keep(reason, pairs[np.isin(pairs[:, 0], child[times > 1]), 1])
    changed = True
    while changed:
        changed = False
        for pairs in classes.nests.values():
            held = pairs[(reason[pairs[:, 0]] != FREE) & (reason[pairs[:, 1]] == FREE)]
            if len(held):
                reason[held[::-1, 1]] = reason[held[::-1, 0]]  # of several the first
                changed = True


def _keep(reason: Ints, classes: Ints) -> None:
    """These classes may not move, if that is new, for a reason that needs no line in the report."""
    reason[classes[reason[classes] == FREE]] = QUIET


def _break_circles(classes: Classes) -> None:
    """Blocks that lie in one another cannot move; a block whose one channel is itself says nothing."""
    for relation, pairs in classes.nests.items():
        itself = pairs[:, 0] == pairs[:, 1]
        if itself.any():
            sizes = np.bincount(pairs[:, 1], minlength=classes.count)
            blocks = pairs[itself, 1]
            _keep(classes.reason, blocks[sizes[blocks] > 1])
            classes.nests[relation] = pairs[~itself]
    if not classes.nests:
        return
    child, block = np.concatenate(list(classes.nests.values())).T
    matrix = coo_matrix((np.ones(len(child), dtype=bool), (child, block)), shape=(classes.count,) * 2)
    _, circle = connected_components(matrix, directed=True, connection="strong")
    for relation, pairs in classes.nests.items():
        turning = circle[pairs[:, 0]] == circle[pairs[:, 1]]
        if turning.any():
            _keep(classes.reason, pairs[turning].reshape(-1))
            classes.nests[relation] = pairs[~turning]


def align_relations(classes: Classes) -> Classes:
    """Blocks of different relations that hold the same channels are one block.

    Where two relations cross or nest (groups of a convolution across groups of a norm), the one with fewer
    blocks is kept in place: its blocks no longer move, channels still move inside them.
    """
    moving = {r: pairs[classes.reason[pairs[:, 1]] == FREE] for r, pairs in classes.nests.items()}
    blocks = {relation: np.unique(pairs[:, 1]) for relation, pairs in moving.items()}
    kept: list[Ints] = []
    edges: list[Ints] = []
    for relation in sorted(moving, key=lambda r: -len(blocks[r])):
        mine = moving[relation]
        links = [_links(mine, kept[n]) for n in _overlapping(mine, kept)]
        if all(_one_to_one(pairs) for pairs in links):
            kept.append(mine)
            edges += links
        else:
            _keep(classes.reason, blocks[relation])
    if not edges:
        return classes
    of, count = _components(classes.count, *np.concatenate(edges).T)
    reason = np.full(count, FREE)
    np.maximum.at(reason, of, classes.reason)
    nests = {relation: distinct(*of[pairs].T) for relation, pairs in classes.nests.items()}
    return Classes(of[classes.of], reason, classes.texts, nests)


def _overlapping(mine: Ints, kept: list[Ints]) -> list[int]:
    """Those of the relations whose children are numbered like some of ``mine``."""
    if not len(mine):
        return []
    low, high = mine[0, 0], mine[-1, 0]
    return [n for n, pairs in enumerate(kept) if len(pairs) and pairs[0, 0] <= high and pairs[-1, 0] >= low]


def _links(left: Ints, right: Ints) -> Ints:
    """Pairs of blocks of two relations that have a child in common."""
    at = np.searchsorted(right[:, 0], left[:, 0], side="right") - 1
    shared = (at >= 0) & (right[at, 0] == left[:, 0])
    return distinct(left[shared, 1], right[at[shared], 1])


def _one_to_one(pairs: Ints) -> bool:
    return all(len(np.unique(pairs[:, side])) == len(pairs) for side in (0, 1))
