"""Probing: what an operation without a rule does to channels, found out by trying it.

The operation is run on random float64 numbers, and again with what lies along an axis of an operand in another order.

1. An output comes out in that order along one of its axes: the channels are those of that axis.
2. An output stays as it was: the channels end there, summed or compared whatever their order.
3. Axes for which neither holds alone are tried together (the two sides of a product, a layer's rows and its bias);
   where that helps, the channels along them are the same.
4. What is left is not understood, and is kept in place.

A shift by one and a swap of two generate every order, so these two are tried. Random numbers show no more than what
the operation does on such numbers: one that behaves otherwise beyond a threshold of 1e6 passes. So the spec lists what
was probed, and `fxzip.register_rule` is there for those who know better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fxzip.labelling.labels import Labelled, varying
from fxzip.rules.registry import RuleContext, Unsupported, mapped
from fxzip.rules.trial import Operation, Slot, Trial, tensors_of

_TRIALS = 64
"""Most combinations of axes to try at a node."""


@dataclass(frozen=True, eq=False)
class _Finding:
    """Slots that carry the same channels, and for each output the axis on which they come out; None: they end."""

    slots: tuple[Slot, ...]
    moves: tuple[int | None, ...]

    def __str__(self) -> str:
        where = " with ".join(map(str, self.slots))
        axes = sorted({axis for axis in self.moves if axis is not None})
        return f"{where} comes out on axis {', '.join(map(str, axes))}" if axes else f"{where} ends"


def probe(ctx: RuleContext, given: Any, fakes: Any) -> tuple[Any, str]:
    """What the analysis knows of a node's result, by trying.

    Args:
        ctx: The node's context.
        given: The node's arguments (args, kwargs) as the analysis sees them.
        fakes: The same with fake tensors, which have the dtypes.

    Returns:
        The result with its labels, and a sentence on what was found.

    Raises:
        Unsupported: The operation cannot be tried, or treats no axis with channels alike in every order.
    """
    operation = Operation.of(ctx, given, fakes)
    slots = list(operation.slots(ctx))
    if not any(slot.labels is not None for slot in slots):
        raise Unsupported("no single axis carries its channels")
    findings = _search(Trial(operation, ctx), slots)
    known = {slot for finding in findings for slot in finding.slots}
    if not any(slot.labels is not None for slot in known):
        raise Unsupported("when tried, it kept to no order of channels")
    for number, value in enumerate(operation.values[: operation.n_given]):
        _freeze_rest(ctx, value, [slot for slot in known if slot.operand == number])
    result = _labelled(ctx, operation, findings)
    return result, "; ".join(map(str, findings))


def _search(trial: Trial, slots: list[Slot]) -> list[_Finding]:
    """Slots that work alone, then pairs, then more; a slot belongs to the first that works."""
    findings: list[_Finding] = []
    left = list(slots)
    for count in (1, 2, 3, 4):
        for group in combinations(left, count):
            if not all(slot in left for slot in group) or not _promising(trial, group) or trial.count >= _TRIALS:
                continue
            moves = trial.moves(group)
            if moves is None or not (_led(group) or any(axis is not None for axis in moves)):
                continue
            findings.append(_Finding(group, moves))
            left = [slot for slot in left if slot not in group]
    return findings


def _led(group: Sequence[Slot]) -> bool:
    """Whether channels of the input are among them."""
    return any(slot.labels is not None for slot in group)


def _promising(trial: Trial, group: Sequence[Slot]) -> bool:
    """Different axes of one size; without channels of the input, at most two, that an output can have come from.

    A parameter that is summed alone, whatever its order, has no channels to share.
    """
    sizes = {slot.size for slot in group}
    if len(sizes) > 1 or len({(slot.operand, slot.axis) for slot in group}) < len(group):
        return False
    return _led(group) or (len(group) <= 2 and bool(sizes & trial.sizes))


def _labelled(ctx: RuleContext, operation: Operation, findings: Sequence[_Finding]) -> Any:
    """The result with the labels that come out."""
    shapes = [tuple(t.shape) for t in tensors_of(ctx.outputs)]
    factors: list[list[Tensor]] = [[] for _ in shapes]
    for finding in findings:
        ends = all(axis is None for axis in finding.moves)
        known = [_labels(ctx, operation, slot, ends) for slot in finding.slots]
        for other in known[1:]:
            ctx.graph.unite(known[0], other)
        ctx.graph.use(ctx.name, known[0])
        ctx.graph.summed.append((ctx.name, known[0], (0,)))  # for all that is known
        for number, axis in enumerate(finding.moves):
            if axis is not None:
                spread = [-1 if a == axis else 1 for a in range(len(shapes[number]))]
                factors[number].append(known[0].reshape(spread))
    results = iter([Labelled(shape, tuple(found)) for shape, found in zip(shapes, factors, strict=True)])
    return mapped(ctx.outputs, lambda v: next(results) if isinstance(v, Tensor) else v)


def _labels(ctx: RuleContext, operation: Operation, slot: Slot, ends: bool) -> Tensor:
    if slot.labels is not None:
        return slot.labels
    parameter = operation.values[slot.operand].parameter
    return ctx.graph.axis(parameter, slot.axis, slot.size, "contract" if ends else "produce")


def _freeze_rest(ctx: RuleContext, value: Any, known: Sequence[Slot]) -> None:
    """Keep in place what an operand carries beside what was understood: labels of two axes may be understood on one."""
    if not isinstance(value, Labelled) or (value.parameter is not None and not value.factors):
        return
    for factor in value.factors:
        if not any(_is_of(slot, factor) for slot in known):
            ctx.graph.freeze(factor, f"{ctx.name} depends on the order of channels")


def _is_of(slot: Slot, factor: Tensor) -> bool:
    """Whether a slot's labels are those of a factor, along the same axis."""
    return slot.labels is not None and {slot.axis} == varying(factor) and torch.equal(factor.reshape(-1), slot.labels)
