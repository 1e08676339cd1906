"""From labels to channel spaces.

Labels that were united are one *class* (`fxzip.labelling.classes`). Two classes lie in the same channel space exactly
when they touch the same multiset of sites and lie in alike blocks (`fxzip.labelling.refinement`): a permutation of such
classes, blocks moving as wholes, leaves the network's function as it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from fxzip.channels import ChannelSpace, FrozenSpace, Layout, Site
from fxzip.labelling.classes import FREE, QUIET, Classes, Ints, align_relations, distinct, freeze_blocks, unite
from fxzip.labelling.labels import FIRST, LabelGraph, ParameterAxis
from fxzip.labelling.refinement import colours


def partition(graph: LabelGraph) -> tuple[tuple[ChannelSpace, ...], tuple[FrozenSpace, ...], Layout]:
    """Group all labels into channel spaces; the layout has no factors yet."""
    classes = unite(graph)
    freeze_blocks(classes)
    classes = align_relations(classes)
    freeze_blocks(classes)
    return _Builder(graph, classes).build()


class _Builder:
    """Turns coloured classes into spaces, numbering channels by where they are first produced."""

    def __init__(self, graph: LabelGraph, classes: Classes) -> None:
        self.graph, self.classes = graph, classes
        self.colour, self.order = colours(graph, classes.of, classes.reason, classes.nests)
        self._keep_lonely()
        self.parent = np.full(classes.count, -1)
        for pairs in classes.nests.values():
            moving = pairs[classes.reason[pairs[:, 1]] == FREE]
            self.parent[moving[:, 0]] = moving[:, 1]
        self.into = self._absorbed()
        self.of = self.into[classes.of]
        self.parent = np.where((self.parent >= 0) & (self.into == np.arange(classes.count)), self.into[self.parent], -1)
        self.space, self.channel = self._numbered()

    def _free(self, of: Ints) -> Ints:
        """The classes that have labels and may move."""
        live = np.bincount(of[FIRST:], minlength=self.classes.count) > 0
        return np.flatnonzero(live & (self.classes.reason == FREE))

    def _keep_lonely(self) -> None:
        """A channel in a block that cannot move, and like no other one there, is in its place: it needs no map."""
        sizes = np.bincount(self.colour, minlength=self.classes.count)
        for pairs in self.classes.nests.values():
            held = pairs[self.classes.reason[pairs[:, 1]] != FREE, 0]
            lonely = held[(sizes[self.colour[held]] == 1) & (self.classes.reason[held] == FREE)]
            self.classes.reason[lonely] = QUIET

    def _absorbed(self) -> Ints:
        """For each class itself, or its block where that has one channel of its kind: these are copies of the block.

        So are the channels of an attention head that a rotary embedding keeps at their place in the head.
        """
        into, free = np.arange(self.classes.count), self._free(self.classes.of)
        group, size = np.unique(self.colour[free], return_inverse=True, return_counts=True)[1:]
        group_of = np.full(self.classes.count, -1)
        group_of[free] = group
        block = self.parent[free]
        around = np.where(block >= 0, group_of[block], -1)  # the group that the block is in
        other = np.full(len(size), -1)
        other[group] = around
        fits = (around >= 0) & (around == other[group]) & (size[around] == size[group])
        fits &= np.bincount(distinct(group, block + 1)[:, 0], minlength=len(size))[group] == size[group]
        whole = np.bincount(group[fits], minlength=len(size)) == size
        into[free[whole[group]]] = block[whole[group]]
        while not np.array_equal(into, into[into]):
            into = into[into]
        return into

    def _numbered(self) -> tuple[Ints, Ints]:
        """For each class the number of its space, -1 for none, and of its channel there.

        Spaces come in the order of their first channels, channels in the order of their blocks.
        """
        first = np.zeros(self.classes.count, dtype=np.int64)
        first[self.of[:FIRST:-1]] = np.arange(len(self.of) - 1, FIRST, -1)
        first[self.of[FIRST : FIRST + 1]] = FIRST
        free = self._free(self.of)
        free = free[np.argsort(first[free])]
        _, where, which = np.unique(self.colour[free], return_index=True, return_inverse=True)
        space, channel = np.full(self.classes.count, -1), np.zeros(self.classes.count, dtype=np.int64)
        space[free] = np.argsort(np.argsort(where))[which]
        depth = self._depth()
        for level in range(int(depth.max(initial=0)) + 1):
            here = free[depth[free] == level]
            block = channel[self.parent[here]] if level else np.zeros(len(here), dtype=np.int64)
            here = here[np.lexsort((first[here], block, space[here]))]
            start = np.flatnonzero(np.diff(space[here], prepend=-1))
            channel[here] = np.arange(len(here)) - np.repeat(start, np.diff(start, append=len(here)))
        return space, channel

    def _depth(self) -> Ints:
        """The number of blocks around each class."""
        depth, around = np.zeros(self.classes.count, dtype=np.int64), self.parent
        for _ in self.classes.nests:
            inside = around >= 0
            if not inside.any():
                break
            depth += inside
            around = np.where(inside, self.parent[around], -1)
        return depth

    def build(self) -> tuple[tuple[ChannelSpace, ...], tuple[FrozenSpace, ...], Layout]:
        loud = self.classes.reason > QUIET
        by_label = [torch.from_numpy(by_class[self.of]) for by_class in (self.space, self.channel, loud)]
        layout = Layout(by_label[0], by_label[1], by_label[2], torch.from_numpy(self.order))
        layout.space[:FIRST] = -1
        spaces = self._spaces()
        return spaces, self._frozen(), layout

    def _spaces(self) -> tuple[ChannelSpace, ...]:
        free = np.flatnonzero(self.space >= 0)
        free = free[np.lexsort((self.channel[free], self.space[free]))]
        members = np.split(free, np.flatnonzero(np.diff(self.space[free])) + 1) if len(free) else []
        sites = self._sites()
        titles = self._titles(members, sites)
        spaces = []
        for number, found in enumerate(members):
            block = self.parent[found]
            inside = bool(block[0] >= 0)
            spaces.append(
                ChannelSpace(
                    titles[number],
                    len(found),
                    tuple(sites[number]),
                    titles[self.space[block[0]]] if inside else None,
                    torch.from_numpy(self.channel[block]) if inside else None,
                )
            )
        return tuple(spaces)

    def _sites(self) -> dict[int, list[Site]]:
        """The sites of each space, by its number."""
        sites = defaultdict(list)
        known: dict[bytes, list[tuple[int, torch.Tensor]]] = {}  # a norm's parameters lie alike, and are many
        for axis in self.graph.axes.values():
            labels = axis.labels.numpy().reshape(-1)
            classes, order = self.classes.of[labels], self.order[labels]
            key = classes.tobytes() + order.tobytes()
            if key not in known:
                known[key] = self._places(classes, order)
            for number, index in known[key]:
                for here, rows in _by_groups(axis, index):
                    sites[number].append(Site(axis.parameter, axis.axis, axis.role, here, rows, axis.statistic))
        return sites

    def _places(self, classes: Ints, order_in: Ints) -> list[tuple[int, torch.Tensor]]:
        """The spaces that lie along an axis, each with the positions (channels, copies) of its channels."""
        owner, channel = self.space[self.into[classes]], self.channel[self.into[classes]]
        order = np.lexsort((order_in, channel, owner))
        order = order[np.searchsorted(owner[order], 0) :]
        found = []
        for index in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(order) else ():
            number = int(owner[index[0]])
            channels = 1 + np.count_nonzero(np.diff(channel[index]))
            found.append((number, torch.from_numpy(index.reshape(channels, -1))))
        return found

    def _titles(self, members: list[Ints], sites: dict[int, list[Site]]) -> list[str]:
        """Name spaces by the first parameter that produces them; blocks by the node that made them."""
        titles: list[str] = []
        copies: Counter[str] = Counter()
        for number, found in enumerate(members):
            mine = sites.get(number, [])
            site = next((s for s in mine if s.role == "produce"), mine[0] if mine else None)
            title = site.parameter.removesuffix(".weight") if site else self._maker(found[0])
            copies[title] += 1
            titles.append(f"{title}#{copies[title]}" if copies[title] > 1 else title)
        return titles

    def _maker(self, block: np.int64) -> str:
        """The last relation that has this block."""
        made = (relation for relation, pairs in reversed(self.classes.nests.items()) if block in pairs[:, 1])
        return next(made, "channels").partition("@")[0]

    def _frozen(self) -> tuple[FrozenSpace, ...]:
        """Frozen channels by reason, each group named by the first parameter that it touches."""
        parts: dict[tuple[str, int], list[Ints]] = defaultdict(list)
        for axis in self.graph.axes.values():
            classes = self.of[axis.labels.numpy().reshape(-1)]
            reasons = self.classes.reason[classes]
            if axis.role == "produce" and (reasons > QUIET).any():
                _, first = np.unique(classes, return_index=True)
                for why in dict.fromkeys(reasons[first].tolist()):
                    if why > QUIET:
                        parts[axis.parameter, why].append(classes[reasons == why])
        found: dict[tuple[bytes, int], tuple[str, int]] = {}
        for (parameter, why), arrays in parts.items():
            members = np.unique(np.concatenate(arrays))
            found.setdefault((members.tobytes(), why), (parameter.removesuffix(".weight"), len(members)))
        texts = self.classes.texts
        return tuple(FrozenSpace(name, size, texts[why]) for (_, why), (name, size) in found.items())


def _by_groups(axis: ParameterAxis, index: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The (channels, copies) index of a site and its rows; several where copies lie in different groups."""
    if axis.rows is None:
        yield index, None
        return
    width = axis.labels.shape[1]
    groups, which = torch.unique(index // width, dim=1, return_inverse=True)
    for number, group in enumerate(groups.T):
        yield index[:, which == number] % width, axis.rows[torch.unique_consecutive(group)]
