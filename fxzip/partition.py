"""From labels to channel spaces.

Labels that were united are one *class*. Two classes lie in the same channel space exactly when they touch the
same multiset of sites and lie in alike blocks: a permutation of such classes, blocks moving as wholes, leaves
the network's function as it is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxzip.channels import ChannelSpace, FrozenSpace, Layout, Site, group
from fxzip.labels import FIRST, LabelGraph

Ints = NDArray[np.int64]
SILENT = ("input", "output", "position", "meets fixed")
"""Reasons that every network has: what is frozen for these is not worth a line in the report."""


@dataclass(eq=False)
class Classes:
    """Classes of labels, and what is known of each.

    Attributes:
        of: The class of each label; (labels,).
        count: Number of classes.
        reason: Why a class may not move, by class.
        nests: Pairs (child class, block class), of shape (pairs, 2), by relation.
    """

    of: Ints
    count: int
    reason: dict[int, str]
    nests: dict[str, Ints]


def unite(graph: LabelGraph) -> Classes:
    """Resolve the unions, then let what is frozen keep in place what it moves with."""
    none = torch.zeros(0, dtype=torch.int64)
    ends = [torch.cat(side).numpy() for side in zip((none, none), *graph.edges, strict=True)]
    size = graph.count
    matrix = coo_matrix((np.ones(len(ends[0]), dtype=bool), (ends[0], ends[1])), shape=(size, size))
    count, of = connected_components(matrix, directed=False)
    of = of.astype(np.int64)
    reason: dict[int, str] = {}
    for labels, why in graph.frozen:
        for c in np.unique(of[labels.numpy()]):
            if reason.get(int(c), "input").startswith(SILENT):
                reason[int(c)] = why
    pairs = defaultdict(list)
    for relation, children, blocks in graph.parents:
        pairs[relation].append(np.stack([of[children.numpy()], of[blocks.numpy()]], 1))
    nests = {relation: np.unique(np.concatenate(found), axis=0) for relation, found in pairs.items()}
    return Classes(of, int(count), reason, nests)


def _freeze_blocks(classes: Classes) -> None:
    """A block with a channel that cannot move cannot move; a channel in two blocks of a relation cannot either."""
    changed = True
    while changed:
        before = len(classes.reason)
        for pairs in classes.nests.values():
            child, times = np.unique(pairs[:, 0], return_counts=True)
            torn = set(child[times > 1].tolist())
            for c, b in pairs.tolist():
                if c in torn:
                    classes.reason.setdefault(c, "position: lies in several blocks")
                if c in classes.reason:
                    classes.reason.setdefault(b, classes.reason[c])
        changed = len(classes.reason) > before


def _align_relations(classes: Classes) -> Classes:
    """Blocks of different relations that hold the same channels are one block.

    Where two relations cross or nest (groups of a convolution across groups of a norm), the one with fewer
    blocks is kept in place: its blocks no longer move, channels still move inside them.
    """
    relations = sorted(classes.nests, key=lambda r: -len(np.unique(classes.nests[r][:, 1])))
    kept: list[str] = []
    edges: list[Ints] = []
    for relation in relations:
        mine = classes.nests[relation]
        links = [_links(mine, classes.nests[other]) for other in kept]
        if all(_one_to_one(pairs) for pairs in links):
            kept.append(relation)
            edges += links
        else:
            for block in np.unique(mine[:, 1]).tolist():
                classes.reason.setdefault(block, "position: blocks that cross others")
    if not edges:
        return classes
    tied = np.concatenate(edges)
    matrix = coo_matrix((np.ones(len(tied), dtype=bool), (tied[:, 0], tied[:, 1])), shape=(classes.count,) * 2)
    count, of = connected_components(matrix, directed=False)
    of = of.astype(np.int64)
    reason = {int(of[c]): why for c, why in classes.reason.items()}
    nests = {relation: np.unique(of[pairs], axis=0) for relation, pairs in classes.nests.items()}
    return Classes(of[classes.of], int(count), reason, nests)


def _links(left: Ints, right: Ints) -> Ints:
    """Pairs of blocks of two relations that have a child in common."""
    parents = dict(right.tolist())
    pairs = {(b, parents[c]) for c, b in left.tolist() if c in parents}
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _one_to_one(pairs: Ints) -> bool:
    return all(len(np.unique(pairs[:, side])) == len(pairs) for side in (0, 1))


def _colours(graph: LabelGraph, classes: Classes) -> Ints:
    """Colour classes so that only interchangeable ones have the same colour (colour refinement)."""
    marks: list[tuple[Ints, int]] = []
    kinds: dict[tuple[object, ...], int] = {}

    def kind(*key: object) -> int:
        return kinds.setdefault(key, len(kinds))

    for axis in graph.axes.values():
        marks.append((classes.of[axis.labels.reshape(-1).numpy()], kind("site", axis.parameter, axis.axis)))
    for node, labels in graph.uses:
        marks.append((np.unique(classes.of[labels.numpy()]), kind("use", node)))
    for relation, pairs in classes.nests.items():
        for block in np.unique(pairs[:, 1]):
            inside = pairs[pairs[:, 1] == block, 0]
            fixed = int(block) if int(block) in classes.reason else -1
            marks.append((inside, kind("block", relation, fixed)))
    frozen = np.array(sorted(classes.reason), dtype=np.int64)
    colour = _recolour(classes.count, [(c, np.full(len(c), k)) for c, k in marks])
    colour[frozen] = colour.max(initial=0) + 1 + np.arange(len(frozen))
    while True:
        finer = [(np.arange(classes.count), colour)]
        for relation, pairs in classes.nests.items():
            up, down = kind("up", relation), kind("down", relation)
            finer.append((pairs[:, 0], -1 - (colour[pairs[:, 1]] * 2 + 0) - up * 10**12))
            finer.append((pairs[:, 1], -1 - (colour[pairs[:, 0]] * 2 + 1) - down * 10**12))
        new = _recolour(classes.count, finer)
        if len(np.unique(new)) == len(np.unique(colour)):
            return new
        colour = new


def _recolour(count: int, marks: list[tuple[Ints, Ints]]) -> Ints:
    """Number the classes by the multiset of marks that each has."""
    owner = np.concatenate([c for c, _ in marks]) if marks else np.zeros(0, dtype=np.int64)
    mark = np.concatenate([k for _, k in marks]) if marks else np.zeros(0, dtype=np.int64)
    order = np.lexsort((mark, owner))
    owner, mark = owner[order], mark[order]
    start = np.searchsorted(owner, np.arange(count + 1))
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(mark[start[c] : start[c + 1]].tobytes(), len(seen)) for c in range(count)],
        dtype=np.int64,
    )


def partition(graph: LabelGraph) -> tuple[tuple[ChannelSpace, ...], tuple[FrozenSpace, ...], Layout]:
    """Group all labels into channel spaces; the layout has no factors yet."""
    classes = unite(graph)
    _freeze_blocks(classes)
    classes = _align_relations(classes)
    _freeze_blocks(classes)
    colour = _colours(graph, classes)
    return _Builder(graph, classes, colour).build()


class _Builder:
    """Turns coloured classes into spaces, numbering channels by where they are first produced."""

    def __init__(self, graph: LabelGraph, classes: Classes, colour: Ints) -> None:
        self.graph, self.classes, self.colour = graph, classes, colour
        self.first = np.full(classes.count, np.iinfo(np.int64).max)
        labels = np.arange(FIRST, graph.count)
        np.minimum.at(self.first, classes.of[labels], labels)
        self.parent = self._parents()

    def _parents(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for pairs in self.classes.nests.values():
            for child, block in pairs.tolist():
                if block not in self.classes.reason:
                    found[child] = block
        return found

    def build(self) -> tuple[tuple[ChannelSpace, ...], tuple[FrozenSpace, ...], Layout]:
        members = defaultdict(list)
        live = np.unique(self.classes.of[FIRST:])
        for c in live[np.argsort(self.first[live])].tolist():
            if c not in self.classes.reason:
                members[int(self.colour[c])].append(c)
        ordered = self._order_by_block(list(members.values()))
        space = np.full(self.classes.count, -1)
        channel = np.zeros(self.classes.count, dtype=np.int64)
        for number, found in enumerate(ordered):
            space[found], channel[found] = number, np.arange(len(found))
        why = np.zeros(self.classes.count, dtype=bool)
        why[[c for c, reason in self.classes.reason.items() if not reason.startswith(SILENT)]] = True
        of = self.classes.of
        by_label = [torch.from_numpy(by_class[of]) for by_class in (space, channel, why)]
        layout = Layout(by_label[0], by_label[1], by_label[2])
        layout.space[:FIRST] = -1
        sites = self._sites(layout)
        titles = self._titles(ordered, sites)
        spaces = []
        for number, found in enumerate(ordered):
            block = [self.parent.get(c, -1) for c in found]
            inside = block[0] >= 0
            spaces.append(
                ChannelSpace(
                    titles[number],
                    len(found),
                    tuple(sites[number]),
                    titles[int(space[block[0]])] if inside else None,
                    torch.from_numpy(channel[block]) if inside else None,
                )
            )
        return tuple(spaces), self._frozen(), layout

    def _order_by_block(self, members: list[list[int]]) -> list[list[int]]:
        """Order the channels of a space by the order of their blocks, blocks before what lies in them."""
        rank: dict[int, int] = {}

        def depth(c: int) -> int:
            return 0 if c not in self.parent else 1 + depth(self.parent[c])

        by_depth = sorted(range(len(members)), key=lambda n: depth(members[n][0]))
        for n in by_depth:
            members[n].sort(key=lambda c: (rank.get(self.parent.get(c, -1), 0), int(self.first[c])))
            rank.update({c: i for i, c in enumerate(members[n])})
        return members

    def _sites(self, layout: Layout) -> dict[int, list[Site]]:
        sites = defaultdict(list)
        for axis in self.graph.axes.values():
            owner, channel = layout.space[axis.labels], layout.channel[axis.labels]
            for number in owner[owner >= 0].unique().tolist():
                here = (owner == number).reshape(-1).nonzero().flatten()
                index, rows = group(channel[owner == number], here), None
                if axis.rows is not None:
                    width = axis.labels.shape[1]
                    rows = axis.rows[torch.unique_consecutive(index[:, 0] // width)]
                    index = index % width
                sites[number].append(Site(axis.parameter, axis.axis, axis.role, index, rows))
        return sites

    def _titles(self, ordered: list[list[int]], sites: dict[int, list[Site]]) -> list[str]:
        """Name spaces by the first parameter that produces them; blocks by the node that made them."""
        made = {int(b): r for r, pairs in self.classes.nests.items() for b in np.unique(pairs[:, 1])}
        titles: list[str] = []
        for number, found in enumerate(ordered):
            mine = sites.get(number, [])
            site = next((s for s in mine if s.role == "produce"), mine[0] if mine else None)
            title = site.parameter.removesuffix(".weight") if site else made.get(found[0], "channels")
            copies = sum(t == title or t.startswith(title + "#") for t in titles)
            titles.append(f"{title}#{copies + 1}" if copies else title)
        return titles

    def _frozen(self) -> tuple[FrozenSpace, ...]:
        """Frozen channels by reason, each group named by the first parameter that it touches."""
        sizes: dict[tuple[str, str], set[int]] = defaultdict(set)
        for axis in self.graph.axes.values():
            if axis.role != "produce":
                continue
            for c in np.unique(self.classes.of[axis.labels.reshape(-1).numpy()]).tolist():
                why = self.classes.reason.get(c, "input")
                if not why.startswith(SILENT):
                    sizes[axis.parameter, why].add(c)
        found: dict[tuple[frozenset[int], str], str] = {}
        for (parameter, why), group_ in sizes.items():
            found.setdefault((frozenset(group_), why), parameter.removesuffix(".weight"))
        return tuple(FrozenSpace(name, len(group_), why) for (group_, why), name in found.items())
