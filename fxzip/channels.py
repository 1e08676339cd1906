"""The values that describe channels: where they lie (`Site`, `MergePoint`) and what must move together.

A *channel space* is a set of channels that must share one merge map. Its channels touch parameters at *sites*. Spaces
may be split into blocks (groups of a grouped convolution, attention heads): maps of such a space move whole blocks and
act inside them. The blocks are themselves the channels of another space, its ``parent``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from networkx import DiGraph

Role = Literal["produce", "contract"]
Statistic = Literal["mean", "variance"]
NOT_ASKED = "it was not asked"


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a space's channels touch a parameter or a buffer.

    Attributes:
        parameter: Qualified name of the parameter in the traced module.
        axis: The axis of the parameter along which the channels lie.
        role: ``produce`` (the merge matrix M goes there) or ``contract`` (the unmerge matrix U goes there).
        index: Positions on the axis, int64 of shape (channels, copies). Channel ``c`` lies at every position
            ``index[c]``; copies of different channels correspond by their order.
        rows: None, or the positions on axis 0 at which the channels of each block lie, int64 of shape
            (blocks, rows): a grouped convolution contracts block ``k`` in ``rows[k]`` only. The channels are
            then ordered by block.
        statistic: What a norm's buffer of running statistics holds of the channels; None for weights.
    """

    parameter: str
    axis: int
    role: Role
    index: Tensor
    rows: Tensor | None = None
    statistic: Statistic | None = None

    def __repr__(self) -> str:
        return f"{self.parameter}[{self.axis}]:{self.role}"


@dataclass(frozen=True, eq=False)
class MergePoint:
    """A tensor whose activations decide a space's map: an output of a node, read along some of its axes.

    Attributes:
        node: Name of the node in the (first) traced graph.
        axes: Axes of the node's output over which the channels lie, mostly ``(1,)``.
        index: Positions in the row-major product of those axes, int64 of shape (channels, copies); further
            copies of a channel are further samples of it.
        pooled: Axes over which the activations are averaged, and their squares: channels of other spaces lie there, and
            as it is not known yet how those correspond between the models, they cannot count as samples.
        mixed: The copies of a channel lie at channels of other spaces, too, and are averaged likewise.
    """

    node: str
    axes: tuple[int, ...]
    index: Tensor
    pooled: tuple[int, ...] = ()
    mixed: bool = False


@dataclass(frozen=True, eq=False)
class ChannelSpace:
    """Channels that must share one merge map.

    Attributes:
        name: The module (or parameter) that produces the channels first.
        size: Number of channels.
        sites: Where they touch parameters.
        parent: Name of the space of blocks that these channels lie in, if they do.
        block: For each channel the channel of ``parent`` that it moves with, int64 (size,); ascending.
        fixed: Why there must be as many channels as there are; None where there may be more or fewer.
        bent: Why an orthogonal map of the channels changes the function (`fxzip.analyse` asks); None: it does not.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    parent: str | None = None
    block: Tensor | None = None
    fixed: str | None = None
    bent: str | None = NOT_ASKED

    @property
    def linear(self) -> bool:
        """Whether any orthogonal map of the channels, inside blocks, is exact; ``bent`` says why not."""
        return self.bent is None

    @property
    def resizable(self) -> bool:
        """Whether there may be more channels or fewer; ``fixed`` says why not."""
        return self.fixed is None

    def __repr__(self) -> str:
        more = f", in {self.parent}" * bool(self.parent) + ", linear" * self.linear
        return f"ChannelSpace({self.name!r}, size={self.size}, sites={len(self.sites)}{more})"


Located = tuple[ChannelSpace, tuple[int, ...], Tensor]
"""A space in a node's output, the axes where its channels lie, and their (channels, copies) index along these."""


@dataclass(frozen=True)
class FrozenSpace:
    """Channels that may not be permuted, and why."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Layout:
    """Which channel each label is.

    Attributes:
        space: For each label the number of its space in `ChannelSpec.spaces`, -1 if it is in none; (labels,).
        channel: For each label the number of the channel in its space; (labels,).
        frozen: For each label whether an operation keeps its channel in place; (labels,).
        order: For each label its rank among the copies of its channel; (labels,).
        factors: For each node with a tensor output the label tensors of that output.
        bundles: The nodes whose output is a collection of tensors with channels, or has channels and samples on one
            axis: these are not found by their places.
    """

    space: Tensor
    channel: Tensor
    frozen: Tensor
    order: Tensor
    factors: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    bundles: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True, eq=False)
class ChannelSpec:
    """The channel spaces of a traced network, as `fxzip.analyse` finds them.

    Attributes:
        spaces: The spaces, in the order in which the network produces them.
        frozen: Channels that an operation keeps in place, each with the reason.
        coverage: Share of the weight elements that lie in a space, 0 to 1.
        layout: Which channel lies where in which tensor.
        example: Example inputs (args, kwargs) of the network.
        probed: The operations without a rule that were understood by trying them (`fxzip.rules.probe`), and what was
            found: a sentence for each.
        opposed: For each node that uses axes of a parameter in another role than its sites have (a language model's
            read-out that is its embedding too) those axes: (parameter, axis, role).
        folded: The parameters of the traced network that the model computes from others (standardised weights).
    """

    spaces: tuple[ChannelSpace, ...]
    frozen: tuple[FrozenSpace, ...]
    coverage: float
    layout: Layout = field(repr=False)
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}), repr=False)
    probed: tuple[str, ...] = ()
    opposed: Mapping[str, tuple[tuple[str, int, Role], ...]] = field(default_factory=dict, repr=False)
    folded: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ChannelSpace:
        """The space of that name; raises KeyError naming the spaces that there are."""
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(f"no channel space {name!r}; there are: {', '.join(s.name for s in self.spaces)}")

    @cached_property
    def by_depth(self) -> tuple[ChannelSpace, ...]:
        """The spaces, those of blocks before those that lie in them."""
        depth: dict[str, int] = {}

        def of(space: ChannelSpace) -> int:
            if space.name not in depth:
                depth[space.name] = 0 if space.parent is None else 1 + of(self[space.parent])
            return depth[space.name]

        return tuple(sorted(self.spaces, key=of))

    def children(self, name: str) -> tuple[ChannelSpace, ...]:
        """The spaces whose channels lie in blocks of this one."""
        return tuple(space for space in self.spaces if space.parent == name)

    def inside(self, name: str) -> Iterator[ChannelSpace]:
        """The spaces whose channels lie in blocks of a space, however deep."""
        for child in self.children(name):
            yield child
            yield from self.inside(child.name)

    def root(self, name: str) -> ChannelSpace:
        """The outermost space of blocks around a space's channels; itself where they lie in none."""
        space = self[name]
        while space.parent is not None:
            space = self[space.parent]
        return space

    @cached_property
    def units(self) -> dict[str, Tensor]:
        """For each space the channel of its root that each of its channels lies in, int64 (size,)."""
        found: dict[str, Tensor] = {}
        for space in self.by_depth:
            inside = space.parent is not None and space.block is not None
            found[space.name] = found[str(space.parent)][space.block] if inside else torch.arange(space.size)
        return found

    def with_parents(self, names: Collection[str]) -> set[str]:
        """The named spaces and those of the blocks that they lie in."""
        wanted = set(names)
        for space in reversed(self.by_depth):
            if space.name in wanted and space.parent is not None:
                wanted.add(space.parent)
        return wanted

    def locate(self, node: str) -> tuple[Located, ...]:
        """The spaces in a node's output: each with the axes and the (channels, copies) index of a `MergePoint`."""
        if node not in self._located:
            self._located[node] = tuple(self._locate(node))
        return self._located[node]

    def is_whole(self, node: str) -> bool:
        """Whether each space with channels in a node's output has all of them there, by the same of their copies."""
        whole = {space.name for space, _, _ in self.locate(node)}
        for factor in self.layout.factors.get(node, ()):
            owner = self.layout.space[factor.reshape(-1)]
            if any(self.spaces[number].name not in whole for number in owner[owner >= 0].unique().tolist()):
                return False
        return True

    @cached_property
    def _located(self) -> dict[str, tuple[Located, ...]]:
        return {}

    def _locate(self, node: str) -> Iterator[Located]:
        for factor in () if node in self.layout.bundles else self.layout.factors.get(node, ()):
            axes = tuple(a for a, size in enumerate(factor.shape) if size > 1)
            flat = factor.reshape(-1)
            owner, channel = self.layout.space[flat], self.layout.channel[flat]
            for number in owner[owner >= 0].unique().tolist():
                space = self.spaces[number]
                here = (owner == number).nonzero().flatten()
                times = channel[here].bincount(minlength=space.size)
                if bool((times == times[0]).all()) and len(times) == space.size:
                    index = group(channel[here], here, self.layout.order[flat[here]])
                    copies = self.layout.order[flat[index]]
                    if bool((copies == copies[:1]).all()):  # else one copy of some channels, and another of others
                        yield space, axes, index

    def graph(self, points: Mapping[str, Sequence[MergePoint]] | None = None) -> DiGraph:
        """Spaces and layers as a graph of networkx, to be drawn and asked; see `fxzip.spec_graph`.

            graph = prepared.spec.graph(prepared.points)
            networkx.shortest_path(graph, ("layer", "conv1"), ("layer", "layer2.0.conv2"))

        Args:
            points: Merge points by space, as `Prepared.points` has them; None: without any.
        """
        from fxzip.spec_graph import spec_graph

        return spec_graph(self, points or {})

    def permute(self, model: nn.Module, generator: Generator | None = None) -> nn.Module:
        """A copy of the network with the channels of every space in a random order; it computes the same function.

        Args:
            model: The network that was analysed, or another of the same architecture.
            generator: The source of randomness; None for PyTorch's own.

        Returns:
            A copy of the module; a traced GraphModule where weights (standardised ones, say) had to be folded first.
        """
        from fxzip.passes.permute import permuted

        return permuted(self, model, generator)

    def __str__(self) -> str:
        from fxzip.report import spec_table

        return spec_table(self)


def group(keys: Tensor, values: Tensor, order: Tensor) -> Tensor:
    """Values in rows by ascending key, each row by its order, then ascending; int64 (distinct keys, values per key).

    Every key must come equally often, as channels of one space do.
    """
    arranged = torch.argsort(values)
    arranged = arranged[torch.argsort(order[arranged], stable=True)]
    arranged = arranged[torch.argsort(keys[arranged], stable=True)]
    return values[arranged].reshape(int(keys.unique().numel()), -1)
