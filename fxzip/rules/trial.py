"""Trials for `fxzip.rules.probe`: an operation run on random numbers, in one order of its channels and in others."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from fxzip.labelling.labels import FIRST, Labelled, varying
from fxzip.rules.registry import RuleContext, Unsupported

_LARGEST = 2**24
"""Most elements of an operand or an output that are worth trying."""
_TOLERANCE = 1e-9
_NOWHERE: set[int | None] = {None}


@dataclass(frozen=True, eq=False)
class Slot:
    """An axis that channels lie along: of an operand, or of a parameter (whose labels are made when needed)."""

    operand: int
    axis: int
    size: int
    labels: Tensor | None
    name: str

    def __str__(self) -> str:
        return f"axis {self.axis} of {self.name}"


@dataclass(frozen=True, eq=False)
class Operation:
    """A node's call as a function of its tensors.

    Attributes:
        values: The tensors as the analysis sees them: those given to the node, then the module's own parameters.
        fakes: The same as fake tensors or parameters.
        names: What to call them.
        n_given: How many were given to the node.
        run: Computes the outputs (flat) from real tensors.
    """

    values: tuple[Any, ...]
    fakes: tuple[Tensor, ...]
    names: tuple[str, ...]
    n_given: int
    run: Callable[[Sequence[Tensor]], list[Any]]

    @classmethod
    def of(cls, ctx: RuleContext, given: Any, fakes: Any) -> Operation:
        """From a node; raises Unsupported where something in its arguments cannot be made up."""
        leaves, structure = pytree.tree_flatten(given)
        fake_leaves = pytree.tree_leaves(fakes)
        if len(leaves) != len(fake_leaves):
            raise Unsupported("its arguments cannot be made up")
        places = [i for i, fake in enumerate(fake_leaves) if isinstance(fake, Tensor)]
        names = [f"argument {n}" if len(places) > 1 else "the input" for n in range(len(places))]
        module = None if ctx.module is None else copy.deepcopy(ctx.module).double().eval()
        own = {} if module is None else dict(module.named_parameters())
        target = ctx.node.target

        def run(tensors: Sequence[Tensor]) -> list[Any]:
            filled = list(fake_leaves)
            for place, tensor in zip(places, tensors, strict=False):
                filled[place] = tensor
            args, kwargs = pytree.tree_unflatten(filled, structure)
            if module is not None:
                parameters = dict(zip(own, tensors[len(places) :], strict=True))
                result = torch.func.functional_call(module, parameters, tuple(args), kwargs)
            elif isinstance(target, str):
                result = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                assert callable(target)
                result = target(*args, **kwargs)
            return pytree.tree_leaves(result)

        values = [leaves[i] for i in places]
        values += [Labelled(tuple(p.shape), parameter=f"{target}.{name}") for name, p in own.items()]
        tensors = [fake_leaves[i] for i in places] + list(own.values())
        if max(t.numel() for t in (*tensors, *tensors_of(ctx.outputs))) > _LARGEST:
            raise Unsupported("it is too large to be tried")
        return cls(tuple(values), tuple(tensors), (*names, *own), len(places), run)

    def slots(self, ctx: RuleContext) -> Iterator[Slot]:
        """Every axis of an operand along which labels lie, alone; and every axis of a parameter."""
        for number, value in enumerate(self.values):
            if not isinstance(value, Labelled):
                continue
            if value.parameter is not None and not value.factors:
                for axis, size in enumerate(value.shape):
                    if size > 1:
                        yield Slot(number, axis, size, None, self.names[number])
                continue
            for factor in value.factors:
                if len(varying(factor)) == 1 and bool((factor >= FIRST).any()):
                    (axis,) = varying(factor)
                    yield Slot(number, axis, value.shape[axis], factor.reshape(-1), self.names[number])


class Trial:
    """Runs an operation on random numbers and says which orders of its operands its outputs follow."""

    def __init__(self, operation: Operation, ctx: RuleContext) -> None:
        self.operation = operation
        self.count = 0
        outputs = tensors_of(ctx.outputs)
        self.used = _used(ctx, len(outputs))
        self.sizes = {size for number in self.used for size in outputs[number].shape}
        self.samples = [found for seed in range(3) if (found := self._sample(seed)) is not None]
        if not self.samples:
            raise Unsupported("it gives nothing finite on random numbers")

    def _sample(self, seed: int) -> tuple[list[Tensor], list[Any]] | None:
        """Random operands and the outputs for them; None where these are not finite."""
        g = Generator().manual_seed(seed)
        tensors = [
            _random(fake, g, seed) if isinstance(value, Labelled) else _widened(value)
            for value, fake in zip(self.operation.values, self.operation.fakes, strict=True)
        ]
        outputs = self._run(tensors)
        if outputs is None or any(isinstance(o, Tensor) and not bool(o.isfinite().all()) for o in outputs):
            return None
        return tensors, outputs

    def _run(self, tensors: Sequence[Tensor]) -> list[Any] | None:
        copies = [t.clone() for t in tensors]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outputs = self.operation.run(copies)
        except Exception:
            return None
        if any(not torch.equal(a, b) for a, b in zip(tensors, copies, strict=True)):
            raise Unsupported("it writes into its inputs")
        return outputs

    def moves(self, slots: Sequence[Slot]) -> tuple[int | None, ...] | None:
        """Where channels along ``slots``, permuted together, come out in each output; None: nowhere."""
        self.count += 1
        size = slots[0].size
        possible: list[set[int | None]] | None = None
        for tensors, before in self.samples:
            for order in _generators(size):
                moved = list(tensors)
                for slot in slots:
                    moved[slot.operand] = moved[slot.operand].index_select(slot.axis, order)
                after = self._run(moved)
                if after is None or len(after) != len(before):
                    return None
                pairs = enumerate(zip(before, after, strict=True))
                found = [_followed(b, a, order) if n in self.used else _NOWHERE for n, (b, a) in pairs]
                possible = found if possible is None else [p & f for p, f in zip(possible, found, strict=True)]
                if not all(possible):
                    return None
        if possible is None:
            return None
        return tuple(max(p, key=lambda axis: -1 if axis is None else axis) for p in possible)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _used(ctx: RuleContext, count: int) -> frozenset[int]:
    """Which of the outputs anything reads; all of them where that cannot be told."""
    if not isinstance(ctx.outputs, (tuple, list)):
        return frozenset(range(count))
    numbers = iter(range(count))
    parts = [[next(numbers) for _ in tensors_of(part)] for part in ctx.outputs]
    read: set[int] = set()
    for user in ctx.node.users:
        index = user.args[1] if user.target is operator.getitem and user.args[0] is ctx.node else None
        if not isinstance(index, int):
            return frozenset(range(count))
        if user.users:
            read.update(parts[index])
    return frozenset(read)


def _random(fake: Tensor, g: Generator, seed: int) -> Tensor:
    """Numbers like those that an operation may want: of both signs, between 0 and 1, or beyond 1."""
    shape = tuple(fake.shape)
    if fake.is_complex():
        return torch.randn(shape, generator=g, dtype=torch.complex128)
    if fake.is_floating_point():
        if seed == 0:
            return torch.randn(shape, generator=g, dtype=torch.float64)
        return torch.rand(shape, generator=g, dtype=torch.float64) + (seed - 1) + 0.01
    return torch.randint(0, 2 if seed else 1, shape, generator=g).to(fake.dtype)


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _generators(size: int) -> Iterator[Tensor]:
    """A shift by one and a swap: every order is made of them."""
    order = torch.arange(size)
    yield order.roll(1)
    if size > 2:
        order[:2] = torch.tensor([1, 0])
        yield order


def _followed(before: Any, after: Any, order: Tensor) -> set[int | None]:
    """The axes along which ``after`` is ``before`` in the given order; None among them if it is ``before`` itself."""
    if not isinstance(before, Tensor):
        return {None} if before == after else set()
    if before.shape != after.shape:
        return set()
    found: set[int | None] = {None} if _same(before, after) else set()
    for axis, size in enumerate(before.shape):
        if size == len(order) and _same(before.index_select(axis, order), after):
            found.add(axis)
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max().clamp(min=1e-300))
