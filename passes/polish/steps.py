"""Steps: one Gauss-Newton step after the other, each of the length that the error's quadratic form asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from fxzip.passes.polish.curvature import Curvature, parameters
from fxzip.passes.polish.goal import TOGETHER, Answered, Goal
from fxzip.passes.polish.network import Network

LENGTHS = (1.0, 0.5, 0.25, 0.1)
"""Lengths that are tried for a step, as shares of the one that should be best."""
DAMPING, EASED, TIGHTENED, LEAST = 1e-2, 0.7, 4.0, 1e-5
"""What is added to a curvature at first, as a share of it; what it is multiplied by after a step of full length and
after any other; and the least that it becomes."""
AT_ONCE = 2**11
"""Images of a step, if there are more; each step takes other ones."""
MOVED = 1e-2
"""The share of the parameters' size that they are moved by to see what a step does to the outputs."""


def turn(places: Sequence[int], number: int) -> list[int]:
    """The places of a step: all, or some of many, others each time."""
    stride = max(len(places) * TOGETHER // AT_ONCE, 1)
    return list(places[number % stride :: stride])


@contextmanager
def learning(network: Network) -> Iterator[None]:
    """Parameters that take gradients, and do again only if they did when this is over."""
    flags = [(p, p.requires_grad) for p in parameters(network)]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass(eq=False)
class Run:
    """A network on its way.

    Attributes:
        network: The network.
        goal: What it should give.
        generator: Of the probes.
        damping: What is added to the curvature, as a share of it.
        last: The last step, for each parameter.
    """

    network: Network
    goal: Goal
    generator: Generator
    damping: float = DAMPING
    last: list[Tensor] = field(default_factory=list)

    def values(self) -> list[Tensor]:
        """The parameters as they are."""
        return [p.detach().clone() for p in parameters(self.network)]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Set the parameters."""
        for p, value in zip(parameters(self.network), values, strict=True):
            p.copy_(value)

    @torch.no_grad()
    def error(self, places: Sequence[int]) -> float:
        """The error on some parts of the images."""
        return sum(self.goal.error(place, self.network.outputs(self.goal.images[place])) for place in places)

    @torch.no_grad()
    def _answers(self, place: int) -> list[Answered]:
        return list(self.goal.answered(place, self.network.outputs(self.goal.images[place])))

    def ease(self, length: float) -> None:
        """Damp less after a whole step, more after a part of one."""
        self.damping = max(self.damping * EASED, LEAST) if length == 1 else self.damping * TIGHTENED

    def step(self, places: Sequence[int]) -> bool:
        """Take one step; False where none of any length is a gain."""
        found = Curvature.of(self.network, self.goal, places, self.generator)
        ways = found.steps(self.damping) + ([self.last] if self.last else [])
        start = self.values()
        whole = _summed(ways, self._best(ways, found.gradient, start, places))
        for length in LENGTHS:
            self.write([value + length * move for value, move in zip(start, whole, strict=True)])
            if self.error(places) < found.error:
                self.last = [length * move for move in whole]
                self.ease(length)
                return True
        self.write(start)
        return False

    def _best(
        self, ways: list[list[Tensor]], gradient: list[Tensor], start: list[Tensor], places: Sequence[int]
    ) -> list[float]:
        """How far to go along each of some ways: the minimum of the quadratic form that the error is, nearly."""
        slopes = torch.tensor([float(_product(gradient, way)) for way in ways], dtype=torch.float64)
        power = sum(float(value.square().sum()) for value in start) ** 0.5
        short = [MOVED * power / max(float(_product(way, way)) ** 0.5, 1e-30) for way in ways]
        form = torch.zeros(len(ways), len(ways), dtype=torch.float64)
        for place in places:
            here = self._answers(place)
            changes = []
            for way, size in zip(ways, short, strict=True):
                self.write([value + size * move for value, move in zip(start, way, strict=True)])
                pairs = zip(self._answers(place), here, strict=True)
                roots = [was.distance.root((now.has - was.has) / size, was.has) for now, was in pairs]
                changes.append(torch.cat(roots))
            self.write(start)
            stacked = torch.stack(changes).double()
            form += (stacked @ stacked.T).cpu()
        damped = form + 1e-9 * form.diagonal().mean() * torch.eye(len(form), dtype=form.dtype)
        found: list[float] = torch.linalg.lstsq(damped, -slopes[:, None]).solution[:, 0].tolist()
        return found


def _summed(ways: Sequence[Sequence[Tensor]], lengths: Sequence[float]) -> list[Tensor]:
    """The sum of some ways, each so long."""
    return [
        sum((length * move for length, move in zip(lengths, moves, strict=True)), torch.zeros_like(moves[0]))
        for moves in zip(*ways, strict=True)
    ]


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]).sum()
