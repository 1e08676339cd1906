"""Polish: damped Gauss-Newton steps of all layers together, on the heads' outputs.

Refit solves layer after layer, each for what the parents have at its place. That is the best a layer can do alone, but
what is left is shared out badly: an error in a direction that no later layer reads costs as much as one that changes
the answer, and where all blocks write to one residual stream, each puts right what it can of all before. So once every
layer has been solved, all are moved together towards what the parents *answer*: by steps of Gauss and Newton on the
unexplained share of their outputs, with a Kronecker-factored curvature (`fxzip.passes.polish.curvature`).

The length of a step is no setting: along the step and the one before, the error is a quadratic form, whose minimum is
taken (Martens and Grosse, arXiv 1503.05671, section 7), and halved while it is no gain. There are no labels and no
learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from fxzip.data.batches import Given
from fxzip.data.loops import counted
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.polish.curvature import Curvature, parameters
from fxzip.passes.polish.goal import TOGETHER, Answered, Goal, in_parts
from fxzip.passes.polish.network import Network
from fxzip.passes.split import Split
from fxzip.settings import RefitOptions

LENGTHS = (1.0, 0.5, 0.25, 0.1)
"""Lengths that are tried for a step, as shares of the one that should be best."""
DAMPING, EASED, TIGHTENED, LEAST = 1e-2, 0.7, 4.0, 1e-5
"""What is added to a curvature at first, as a share of it; what it is multiplied by after a step of full length and
after any other; and the least that it becomes."""
AT_ONCE = 2**11
"""Images of a step, if there are more; each step takes other ones."""
MOVED = 1e-2
"""The share of the parameters' size that they are moved by to see what a step does to the outputs."""


def polish(parts: Split, plan: MergePlan, images: Sequence[Given], options: RefitOptions, progress: bool = True) -> int:
    """Polish trunk and heads in place; returns how many steps were taken, which are ``options.polish`` at most.

    Args:
        parts: Trunk and heads, as they were fitted.
        plan: What they were built from.
        images: The calibration images.
        options: Of the refit: the steps, the seed, and the memory that the parents' outputs may take.
        progress: Show a bar.
    """
    network = Network(parts.trunk, dict(enumerate(parts.heads)))
    goal = Goal(dict(enumerate(plan.alignment.modules)), in_parts(images), options.memory)
    return run(network, goal, options.polish, options.seed, progress)


def run(network: Network, goal: Goal, steps: int, seed: int, progress: bool, description: str = "polishing") -> int:
    """Take so many steps, or fewer where one is no gain; returns how many."""
    with _learning(network), counted(steps, progress, description) as done:
        found = _Run(network, goal, Generator().manual_seed(seed))
        for number in range(steps):
            if not found.step(_turn(goal.places, number)):
                return number
            done()
    return steps


def _turn(places: Sequence[int], number: int) -> list[int]:
    """The places of a step: all, or some of many, others each time."""
    stride = max(len(places) * TOGETHER // AT_ONCE, 1)
    return list(places[number % stride :: stride])


@contextmanager
def _learning(network: Network) -> Iterator[None]:
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
class _Run:
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
                self.damping = max(self.damping * EASED, LEAST) if length == 1 else self.damping * TIGHTENED
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
