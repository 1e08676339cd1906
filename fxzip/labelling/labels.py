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

from fxzip.channels import Role, Statistic

VOID = 0
"""The label of a uniform constant, padding for one: it says nothing and ties nothing."""
FIXED = 1
"""The label of an element that must stay where it is."""
FIRST = 2
"""The first label that names a channel."""
SMALL = 4096
"""Up to this many elements a simple pass over all of them is cheaper than looking for a shortcut."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A tensor as the analysis sees it.

    Attributes:
        shape: Its sizes, batch 1.
        factors: Label tensors, each of rank ``len(shape)`` and of size 1 or ``shape[axis]`` on each axis.
        parameter: Qualified name, if it is a parameter or buffer itself.
        uniform: All elements are known to be equal (zeros, ones).
        versions: For each factor what was computed of its channels, named by the node that did it last; "" where that
            does not matter. Moves that leave a channel's elements in order keep it.
    """

    shape: tuple[int, ...]
    factors: tuple[Tensor, ...] = ()
    parameter: str | None = None
    uniform: bool = False
    versions: tuple[str, ...] = ()

    def version(self, factor: Tensor) -> str:
        """The version of one of the factors."""
        pairs = zip(self.factors, self.versions, strict=False)
        return next((version for known, version in pairs if known is factor), "")


def in_place(factor: Tensor) -> Tensor:
    """A factor whose constants are all alike no more: each stays where it is."""
    return torch.where(factor == VOID, FIXED, factor) if bool((factor == VOID).any()) else factor


def varying(factor: Tensor) -> frozenset[int]:
    """The axes along which the labels of a factor vary."""
    return frozenset([axis for axis, size in enumerate(factor.shape) if size > 1])


def compress(labels: Tensor) -> Tensor | None:
    """Shrink to size 1 every axis along which labels do not vary; None if nothing is labelled at all.

    `VOID` agrees with every label, so that zero padding of pixels leaves a factor as it is.
    """
    if labels.numel() == 0:
        return None
    for axis, stride in enumerate(labels.stride()):
        if stride == 0:  # an expanded axis needs no look
            labels = labels.narrow(axis, 0, 1)
    for axis in range(labels.dim()):
        if labels.shape[axis] == 1 or (labels.numel() > SMALL and _differ(labels, axis)):
            continue
        first = labels.narrow(axis, 0, 1)
        if bool((labels == first).all()):
            labels = first
            continue
        top = labels.amax(axis, keepdim=True)
        if bool(((labels == top) | (labels == VOID)).all()):
            labels = top
    if labels.numel() == 1 and int(labels) <= FIXED:
        return None
    return None if bool((labels == VOID).all()) else labels.contiguous()


def _differ(labels: Tensor, axis: int) -> bool:
    """Whether the first two positions along an axis tell that labels vary along it; often they do."""
    first, second = labels.select(axis, 0), labels.select(axis, 1)
    return bool(((first != second) & (first != VOID) & (second != VOID)).any())


def aligned(value: Labelled, rank: int) -> Labelled:
    """The value with leading axes of size 1, as broadcasting adds them."""
    if len(value.shape) == rank:
        return value
    lead = (1,) * (rank - len(value.shape))
    factors = tuple(f.reshape(lead + tuple(f.shape)) for f in value.factors)
    return Labelled(lead + tuple(value.shape), factors, value.parameter, value.uniform)


@dataclass(eq=False)
class ParameterAxis:
    """The labels along one axis of a parameter, first used by ``node``; (blocks, n) where they depend on ``rows``.

    ``statistic`` is what a norm keeps there.
    """

    parameter: str
    axis: int
    labels: Tensor
    role: Role
    rows: Tensor | None = None
    node: str = ""
    statistic: Statistic | None = None


@dataclass(eq=False)
class LabelGraph:
    """All labels of a network, and what was found to hold between them.

    Attributes:
        axes: Labels along the axes of parameters, by (parameter, axis).
        edges: Pairs of labels that meet; two that name channels are one channel.
        parents: (relation, child labels, block labels): children move with their block.
        frozen: (labels, reason): labels that may not be permuted.
        uses: (node, labels): labels that a node treats as one set (a norm, an activation, a mean).
        summed: (node, labels, axes): labels that a node sums over along these axes, without weights that tell how much.
        places: (node, labels, places): at a node these labels stand at fixed places, inside blocks that may move:
            only labels of one place can be permuted among themselves.
        aliases: The one name to use for a parameter that has several.
        opposed: For each node the axes of parameters (parameter, axis, role) that it uses in another role than the
            node that used them first.
        node: The node whose rule runs.
        count: One more than the last label.
        origins: The first labels of those that were made together, ascending.
    """

    axes: dict[tuple[str, int], ParameterAxis] = field(default_factory=dict)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    parents: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    uses: list[tuple[str, Tensor]] = field(default_factory=list)
    summed: list[tuple[str, Tensor, tuple[int, ...]]] = field(default_factory=list)
    places: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    opposed: dict[str, list[tuple[str, int, Role]]] = field(default_factory=dict)
    node: str = ""
    count: int = FIRST
    origins: list[int] = field(default_factory=list)
    _injective: dict[int, tuple[Tensor, bool]] = field(default_factory=dict, repr=False)
    _met: tuple[Tensor, Tensor, list[int]] | None = field(default=None, repr=False)
    _numbers: Tensor = field(default_factory=lambda: torch.arange(1, SMALL), repr=False)

    def fresh(self, *shape: int) -> Tensor:
        """New labels, int64 of the given shape."""
        n = int(torch.Size(shape).numel())
        labels = torch.arange(self.count, self.count + n).reshape(shape)
        self.origins.append(self.count)
        self.count += n
        return labels

    def counted(self, count: int) -> Tensor:
        """The numbers 1 to ``count``: always the same memory, not to be written to."""
        if count > len(self._numbers):
            self._numbers = torch.arange(1, 1 + 2 * count)
        return self._numbers[:count]

    def is_injective(self, factor: Tensor) -> bool:
        """Whether no label that names a channel comes twice in a factor."""
        known = self._injective.get(id(factor))
        if known is None:
            flat = factor.reshape(-1)
            found = bool((flat[1:] > flat[:-1]).all()) and (not len(flat) or int(flat[0]) >= FIRST)
            if not found:
                flat = flat[flat >= FIRST]
                found = len(flat.unique()) == len(flat)
            known = self._injective[id(factor)] = (factor, found)  # the factor, too, so that its id stays its own
        return known[1]

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Labels that meet at one position (after broadcasting) are one channel, or in place if one is `FIXED`."""
        if left.shape != right.shape:
            left, right = torch.broadcast_tensors(left, right)
        if left is not right:
            self.edges.append((left.reshape(-1), right.reshape(-1)))

    def meetings(self) -> tuple[Tensor, Tensor, list[int]]:
        """All pairs of labels that met: those on the left, those on the right, and how many each time."""
        sizes = [len(left) for left, _ in self.edges]
        if self._met is None or len(self._met[2]) != len(sizes):
            none = torch.zeros(0, dtype=torch.int64)
            left, right = (torch.cat(side) for side in zip((none, none), *self.edges, strict=True))
            self._met = left, right, sizes
        return self._met

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These labels may not be permuted, and why."""
        self.frozen.append((_distinct(labels), reason))

    def use(self, node: str, labels: Tensor) -> None:
        """A node treats these labels as one set: they can be permuted among themselves only."""
        self.uses.append((node, _distinct(labels)))

    def place(self, node: str, labels: Tensor, places: Tensor) -> None:
        """Labels (after broadcasting) that stand at fixed places."""
        labels, places = (t.reshape(-1) for t in torch.broadcast_tensors(labels, places))
        labels, places = labels[labels >= FIRST], places[labels >= FIRST]
        if len(labels):
            width = int(places.amax()) + 1
            pairs = (labels * width + places).unique()
            self.places.append((node, pairs // width, pairs % width))

    def nest(self, relation: str, children: Tensor, blocks: Tensor) -> None:
        """Children move with their block (after broadcasting).

        Blocks that a channel lies in on both sides of a product are of two relations: in one they have no order.

        Nothing moves between `FIXED` blocks, each of which is one of its own; nor does a block with a `FIXED` child.
        """
        fixed = blocks == FIXED
        if bool(fixed.any()):
            anchors = self.fresh(int(fixed.sum()))
            self.freeze(anchors, "position")
            blocks = blocks.masked_scatter(fixed, anchors)
        children, blocks = (t.reshape(-1) for t in torch.broadcast_tensors(children, blocks))
        self.freeze(blocks[(children == FIXED) & (blocks >= FIRST)], "position")
        keep = (children >= FIRST) & (blocks != VOID)
        children, blocks = children[keep], blocks[keep]
        if children.numel():
            self.parents.append((relation, children, blocks))

    def relation(self, title: str) -> str:
        """A name for a relation like no other's."""
        return f"{title}@{len(self.parents)}"

    def axis(self, parameter: str, axis: int, size: int, role: Role) -> Tensor:
        """The labels along an axis of a parameter: the same ones each time that it is used."""
        key = (self.aliases.get(parameter, parameter), axis)
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, self.fresh(size), role, node=self.node)
        elif self.axes[key].role != role:
            self.opposed.setdefault(self.node, []).append((*key, role))
        return self.axes[key].labels

    def contract(self, parameter: str, axis: int) -> None:
        """An axis of a parameter that was opened as a value is contracted at this node."""
        key = (self.aliases.get(parameter, parameter), axis)
        known = self.axes.get(key)
        if known is None:
            return
        opposed = self.opposed.get(self.node, [])
        if (*key, "produce") in opposed:  # so said the opening
            opposed.remove((*key, "produce"))
        elif known.node == self.node:
            known.role = "contract"
        elif known.role != "contract":
            self.opposed.setdefault(self.node, []).append((*key, "contract"))

    def statistic(self, parameter: str, which: Statistic) -> None:
        """A parameter holds running statistics of the channels along its first axis."""
        key = (self.aliases.get(parameter, parameter), 0)
        if key in self.axes:
            self.axes[key].statistic = which

    def grouped_axis(self, parameter: str, rows: Tensor, size: int, role: Role) -> Tensor:
        """The labels (groups × size) that lie along axis 1 in ``rows`` (groups × rows of a group)."""
        key = (self.aliases.get(parameter, parameter), 1)
        if key not in self.axes:
            self.axes[key] = ParameterAxis(*key, self.fresh(len(rows), size), role, rows, self.node)
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


def _distinct(labels: Tensor) -> Tensor:
    """Labels in one row, without repetitions where there are many."""
    labels = labels.reshape(-1)
    if labels.numel() <= SMALL:
        return labels
    low = labels.amin()
    seen = torch.zeros(int(labels.amax() - low) + 1, dtype=torch.bool)
    return seen.index_fill_(0, labels - low, True).nonzero().flatten() + low
