"""What a move does to the copies of a channel.

A channel lies at many elements of a tensor: pixels, tokens, repeats. Everywhere the first of them (in row-major order)
stands for the first of any other channel, the second for the second, and so on. A move that takes all elements of
each channel along in that order (a view, a slice of channels, a shuffle) changes nothing. Any other (a roll of pixels,
a slice of tokens) is an operation on the values: channels that go through it are told apart from those that do not, and
from those that go through it otherwise. So is what joins tensors that were computed differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fxzip.labelling.folding import occurrences
from fxzip.labelling.labels import FIRST, VOID, Labelled, in_place, varying
from fxzip.rules.registry import RuleContext

Run = Callable[[Callable[[Labelled], Any]], Any]
"""Runs a move with a tensor in the place of each labelled value; gives its result."""


@dataclass(eq=False)
class Copies:
    """The elements of one factor's channels in a move.

    Attributes:
        ctx: The move's context.
        run: Runs it.
        values: The values that are moved; of several, elements of all come out in one tensor.
        slot: The factor of each value by the value's identity.
        joins: Whether the move puts whole tensors side by side.
        keeps: Whether it keeps all elements in order, whatever its arguments.
        fills: Whether it adds constants.
    """

    ctx: RuleContext
    run: Run
    values: Sequence[Labelled]
    slot: dict[int, Tensor]
    joins: bool
    keeps: bool
    fills: bool = False

    def version(self, factor: Tensor, shape: tuple[int, ...], path: tuple[int, ...]) -> str:
        """The version of a factor that came out; what must be noted of its channels is.

        Args:
            factor: Its labels.
            shape: The output's shape.
            path: Where the output is in the result of the move.
        """
        title = ".".join([self.ctx.name, *map(str, path)])
        if not self.sources:
            return title
        if self.keeps or (self.joins and self._apart()):
            return self._joined
        compact = False
        if self.joins and self._repeated(factor):
            self.ctx.graph.use(title, factor)
            return title
        if len(self.sources) == 1 and not self.joins:
            source = self.sources[0][1]
            in_order = self._in_order(factor, path)
            if in_order is not None and self._injective(source, factor):
                if not in_order:
                    self.ctx.graph.use(title, factor)
                return self._joined if in_order else title
            compact = bool(in_order) and _together(source, self.sources[0][0].shape) and _together(factor, shape)
        labels, kinds = self._counted(factor, path) if compact else self._sequences(factor, path)
        if bool(kinds.any()):
            self.ctx.graph.place(title, labels, kinds)
            return title
        return self._joined

    @cached_property
    def sources(self) -> list[tuple[Labelled, Tensor]]:
        """The values that have the factor, with it."""
        return [(v, self.slot[id(v)]) for v in self.values if id(v) in self.slot]

    @cached_property
    def _joined(self) -> str:
        """The version of all that is moved; where several meet, it is noted which channels come from which."""
        versions = [value.version(factor) for value, factor in self.sources]
        known = sorted(set(versions))
        if len(known) == 1:
            return known[0]
        for version, (_, factor) in zip(versions, self.sources, strict=True):
            self.ctx.graph.place(f"{self.ctx.name}:join", factor, torch.tensor(known.index(version)))
        return self.ctx.name

    def _apart(self) -> bool:
        """Whether no channel is in two of the tensors that are joined."""
        labels = [_channels(factor) for _, factor in self.sources]
        spans = sorted((int(found.min()), int(found.max())) for found in labels if found.numel())
        if all(first[1] < second[0] for first, second in pairwise(spans)):
            return True
        distinct = [found.unique() for found in labels]
        return len(torch.cat(distinct).unique()) == sum(map(len, distinct))

    def _injective(self, *factors: Tensor) -> bool:
        return all(self.ctx.graph.is_injective(factor) for factor in factors)

    def _repeated(self, factor: Tensor) -> bool:
        """Whether the same channels are joined along positions: then each is joined alike."""
        flat = factor.reshape(-1)
        same = all(torch.equal(known.reshape(-1), flat) for _, known in self.sources)
        return same and self._injective(factor)

    @cached_property
    def _positions(self) -> Any:
        """The move, run on the number of each position among those of a channel, from 1."""
        (value, factor), *_ = self.sources
        grid = [1 if f > 1 else size for f, size in zip(factor.shape, value.shape, strict=True)]
        numbers = self.ctx.graph.counted(torch.Size(grid).numel()).reshape(grid).expand(value.shape)
        return self.run(lambda v: numbers if v is value else torch.zeros((), dtype=torch.int64).expand(v.shape))

    def _in_order(self, factor: Tensor, path: tuple[int, ...]) -> bool | None:
        """Whether the positions of each channel come out in order; None where channels differ in that."""
        numbers = _at(self._positions, path)
        for axis in varying(factor):
            if numbers.stride(axis) == 0:
                numbers = numbers.narrow(axis, 0, 1)
        apart = [axis for axis in varying(factor) if numbers.shape[axis] > 1]
        if apart:
            common = numbers.amax(apart, keepdim=True)
            if not bool(((numbers == common) | (factor < FIRST)).all()):
                return None
            numbers = common
        counted = self.ctx.graph.counted(self._number)
        if numbers.numel() == self._number and numbers.data_ptr() == counted.data_ptr() and numbers.is_contiguous():
            return True  # a view of them, as they were
        return numbers.numel() == self._number and torch.equal(numbers.reshape(-1), counted)

    @cached_property
    def _number(self) -> int:
        """How many positions a channel has."""
        value, factor = self.sources[0]
        return torch.Size([s for f, s in zip(factor.shape, value.shape, strict=True) if f == 1]).numel()

    def _counted(self, factor: Tensor, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """As `_sequences`, where all positions are as they were: axes along which no label varies need no look."""
        source = self.sources[0][1]
        if self._injective(source):  # so all elements of a channel that come out are one
            labels = _channels(factor)
            low = labels.amin()
            counts = torch.bincount(labels - low)
            known = counts.nonzero().flatten()
            return known + low, counts[known] - 1
        numbers = torch.arange(source.numel()).reshape(source.shape)
        found = self._moved({id(self.sources[0][0]): numbers}, path, factor)
        if torch.equal(found.reshape(-1), numbers.reshape(-1)):
            return numbers[:0].reshape(-1), numbers[:0].reshape(-1)
        return self._sequences(factor, path, compact=True)

    def _moved(self, codes: dict[int, Tensor], path: tuple[int, ...], factor: Tensor | None = None) -> Tensor:
        """The move, run on these tensors in the place of values; cut to a factor that varies along fewer axes."""
        none = torch.zeros((), dtype=torch.int64)
        found = _at(self.run(lambda v: codes.get(id(v), none).expand(v.shape)), path)
        for axis, size in enumerate(() if factor is None else factor.shape):
            found = found.narrow(axis, 0, size)
        return found

    def _sequences(self, factor: Tensor, path: tuple[int, ...], compact: bool = False) -> tuple[Tensor, Tensor]:
        """The labels that come out, and a number for the order in which the elements of each do: 0 if as before.

        Args:
            factor: The labels.
            path: Where the output is.
            compact: Only the axes along which labels vary need a look.
        """
        codes, step = {}, 1 + len(self.sources)
        for number, (value, known) in enumerate(self.sources, 1):
            known = known if compact else known.expand(value.shape)
            ranks = occurrences(known.reshape(-1))
            codes[id(value)] = (ranks * step + number).reshape(known.shape)
        found = self._moved(codes, path, factor if compact else None)
        labels, entries = factor.expand(found.shape).reshape(-1), found.reshape(-1)
        here = labels >= FIRST
        labels, entries = labels[here], entries[here]
        ranks = occurrences(labels)
        known, which = labels.unique(return_inverse=True)
        sums = torch.zeros(len(known), 3, dtype=torch.int64)
        as_before = (entries // step == ranks) & (entries > 0)
        marks = [_scrambled(entries, ranks), (~as_before).long(), torch.ones_like(ranks)]
        sums.index_add_(0, which, torch.stack(marks, 1))
        kept = (sums[:, 1] == 0) & (sums[:, 2] == self._counts(known, compact))
        kinds = torch.where(kept, 0, 1 + sums[:, 0].unique(return_inverse=True)[1])
        return known, kinds

    def _counts(self, labels: Tensor, compact: bool) -> Tensor:
        """How many elements each label has in all the sources."""
        counts = torch.zeros_like(labels)
        for value, factor in self.sources:
            size = 1 if compact else torch.Size(value.shape).numel() // max(factor.numel(), 1)
            mine, times = factor.reshape(-1).unique(return_counts=True)
            at = torch.searchsorted(mine, labels).clamp(max=len(mine) - 1)
            counts += torch.where(mine[at] == labels, times[at] * size, 0)
        return counts


def constants_apart(factor: Tensor | None, copies: Copies) -> Tensor | None:
    """A factor that came out; where constants of several origins lie among its channels, these stay in place."""
    if factor is None or not bool((factor == VOID).any()):
        return factor
    before = sum(bool((known == VOID).any()) for _, known in copies.sources)
    added = copies.fills + sum(value.uniform for value in {id(v): v for v in copies.values}.values())
    return factor if before + added < 2 else in_place(factor)


def _channels(factor: Tensor) -> Tensor:
    flat = factor.reshape(-1)
    return flat if bool((flat >= FIRST).all()) else flat[flat >= FIRST]


def _together(factor: Tensor, shape: Sequence[int]) -> bool:
    """Whether the axes along which labels vary are neighbours, but for axes of size 1."""
    kinds = [f > 1 for f, size in zip(factor.shape, shape, strict=True) if size > 1]
    return sum(a != b for a, b in zip([False, *kinds], [*kinds, False], strict=True)) <= 2


def _at(result: Any, path: tuple[int, ...]) -> Tensor:
    for number in path:
        result = result[number]
    assert isinstance(result, Tensor)
    return result


def _scrambled(entries: Tensor, ranks: Tensor) -> Tensor:
    """A number for each pair that looks random; the sum over pairs stands for the set of them."""
    x = entries * -7046029254386353131 + ranks * -4417276706812531889
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
