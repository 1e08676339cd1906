"""Rounds: two units in a row are bettered in turn, the inner one for what the outer one makes of it.

The inner one takes a damped Gauss-Newton step on the outer one's error, with the curvature as a Kronecker product
(Martens and Grosse, arXiv 1503.05671): the Gram matrix of its inputs, and the mean of JᵀJ over positions. The outer one
takes another step of least squares. Its inputs have changed a little since its Gram matrix was taken, so the step's
length is found, too.

A step wants as many samples as a Gram matrix does. Where all batches together have several times as many, each round
takes other ones, and at the end the outer unit is solved on all of them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxzip.passes.refit.fit import Fit
from fxzip.passes.refit.lockstep import Batch
from fxzip.passes.refit.pairs import Pair
from fxzip.passes.refit.regression import Residuals
from fxzip.passes.refit.sums import add_residuals, curved, gram_samples, power, precise, pulled_back
from fxzip.passes.refit.systems import SLIGHT

if TYPE_CHECKING:
    from fxzip.passes.refit.fitting import Fitter

FARTHEST = 2.0
"""No step is longer than so many times what was asked for: curvatures ignore how positions act on one another."""
PROBED = 4
"""Lengths are found on one of this many batches."""
LITTLE = 0.005
"""Share of the outer error below which what a step gains is not worth another one."""


class Probe(NamedTuple):
    """A batch that the length of a step is found on, as it was before.

    Attributes:
        batch: The batch.
        start: The inner value.
        gradient: Half of what the outer error falls by with it.
        error: The outer error.
    """

    batch: Batch
    start: Tensor
    gradient: Tensor
    error: float


class Gradients(NamedTuple):
    """What a step of the inner unit follows from.

    Attributes:
        probes: The batches that its length is found on.
        residuals: The gradients of the outer error by the inner value.
        curvature: The mean of JᵀJ over positions (groups, o, o), by random probes.
        least: What it would be if the inner value made hardly anything (`SLIGHT`) of the outer one.
    """

    probes: list[Probe]
    residuals: Residuals
    curvature: Tensor
    least: float


class Rounds:
    """Betters the two units of a pair in turn.

    Attributes:
        fitter: Solves and runs single units.
        pair: The units.
        inner: The inner one's fit.
        outer: The outer one's.
    """

    def __init__(self, fitter: Fitter, pair: Pair, inner: Fit, outer: Fit) -> None:
        self.fitter, self.pair, self.inner, self.outer = fitter, pair, inner, outer
        self._fresh: set[Batch] = set()  # whose inner value is that of the inner unit's weights as they are

    def run(self, rounds: int) -> None:
        """Better both, on some of the batches each time, and the outer one on all of them at the end."""
        seen, stride = self.fitter.lock.seen, self._stride()
        moved = False
        for number in range(rounds):
            some = [batch for batch in seen if batch.place % stride == number % stride]
            gain = self._step(some, stride)
            if not gain:
                break
            moved = True
            self.fitter.step(self.outer, some, changed=True, stride=stride)
            if gain < LITTLE:
                break
        if moved and stride > 1:
            self._renew(seen)
            self.fitter.step(self.outer, seen, changed=True)

    def _stride(self) -> int:
        """One batch of how many has samples enough for a step."""
        pair = self.pair
        root, count = pair.outer.root, pair.outer.layers[0].contraction.samples
        own = sum(count(batch.env[0][root.name]) for batch in self.fitter.lock.seen)
        (samples,) = map(int, self.fitter.lock.processes.numbers("samples", own))
        enough = max(gram_samples(pair.inner), gram_samples(pair.outer))
        return min(max(samples // enough, 1), self.fitter.lock.taken)

    def _step(self, batches: Sequence[Batch], stride: int) -> float:
        """A Gauss-Newton step of the inner unit; by what share it made the outer one's error smaller."""
        found, inner, gain = self._gradients(batches, stride), self.inner, 0.0
        if found is None:
            return gain
        step = self.fitter.agreed(
            lambda: curved(
                inner.inputs.step(found.residuals, inner.ridge, told=inner.told), found.curvature, found.least
            )
        )

        def best_length() -> float:
            nonlocal gain
            length, gain = self._best_length(found.probes)
            return length

        self._fresh.clear()
        if self.fitter.move(inner, step, best_length):
            self._renew(batches)
        return gain

    def _renew(self, batches: Iterable[Batch]) -> None:
        """Compute anew what the pair gives, after its inner unit changed."""
        for batch in batches:
            self._forward(batch, self.fitter.run(batch, self.pair.inner), batch.env[-1])
            self._fresh.add(batch)

    def _inner_value(self, batch: Batch) -> Tensor:
        if batch in self._fresh:
            value: Tensor = batch.env[-1][self.pair.inner.root.name]
            return value
        return self.fitter.run(batch, self.pair.inner)

    def _gradients(self, batches: Sequence[Batch], stride: int) -> Gradients | None:
        """Add up the gradients of the outer error by the inner value; None where none comes through."""
        pair, goals, lock = self.pair, self.fitter.goals, self.fitter.lock
        contraction, residuals, probes = pair.inner.layers[0].contraction, Residuals(), []
        curvature, count, lost = torch.zeros((), dtype=torch.float64), 0, False
        sizes = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            start = self._inner_value(batch)
            with torch.enable_grad():
                value = start.detach().requires_grad_()
                has = self._forward(batch, value)
            residual = goals.residual(batch, pair.outer, has.detach())
            gradient = pulled_back(has, value, residual)
            if gradient is None:
                lost = True
                break
            sizes += torch.stack([power(goals.wanted(batch, pair.outer)), power(start)]).cpu()
            add_residuals(residuals, pair.inner, batch, gradient)
            if batch.place // stride % PROBED == 0:
                probes.append(Probe(batch, start, gradient, float(power(residual))))
                random = torch.randint(2, has.shape, generator=batch.generator).to(residual) * 2 - 1
                probed = pulled_back(has, value, random * (residual != 0))
                assert probed is not None
                rows = precise(contraction.rows(probed, self.fitter.draw(pair.inner, batch, probed)))
                curvature = curvature + (rows @ rows.mT).double()
                count += rows.shape[2]
        if any(lock.processes.numbers("gradients", lost)):
            return None
        curved_by = [curvature, torch.tensor(count, dtype=torch.float64)] if count else None
        curvature, probed_at = lock.total("curvature", curved_by)
        (sizes,) = lock.total("sizes", [sizes])
        least = float(SLIGHT**2 * sizes[0] / sizes[1].clamp(min=1e-300))
        return Gradients(probes, self.fitter.shared(residuals), curvature / probed_at.to(curvature), least)

    def _best_length(self, probes: Sequence[Probe]) -> tuple[float, float]:
        """The length of a step that was taken with the least outer error, and by what share that is smaller then.

        It is where the parabola is lowest that has the error and its slope before the step, and the error after it.
        """
        changes = [self.fitter.run(probe.batch, self.pair.inner) - probe.start for probe in probes]
        both = list(zip(probes, changes, strict=True))
        slope = -2 * sum(float((probe.gradient * change).sum(dtype=torch.float64)) for probe, change in both)
        numbers = self.fitter.lock.processes.numbers
        before, slope, whole = numbers(
            "the slope of a step", sum(probe.error for probe in probes), slope, self._error(probes, changes, 1.0)
        )
        if slope >= 0:
            return 0.0, 0.0
        bend = whole - before - slope
        length = min(-slope / (2 * bend), FARTHEST) if bend > 0 else FARTHEST
        (found,) = numbers("the length of a step", self._error(probes, changes, length))
        error, length = min((found, length), (whole, 1.0))
        return (length, 1 - error / before) if error < before else (0.0, 0.0)

    def _error(self, probes: Sequence[Probe], changes: Sequence[Tensor], length: float) -> float:
        """The outer error after so much of the changes of the inner value."""
        found = 0.0
        for probe, change in zip(probes, changes, strict=True):
            has = self._forward(probe.batch, probe.start + length * change)
            found += float(power(self.fitter.goals.residual(probe.batch, self.pair.outer, has)))
        return found

    def _forward(self, batch: Batch, value: Tensor, into: dict[str, Tensor] | None = None) -> Tensor:
        """The outer unit's value for an inner value; what lies between goes ``into`` a dict."""
        fresh = {} if into is None else into
        fresh[self.pair.inner.root.name] = value
        return self.fitter.compute(self.pair.path, ChainMap(fresh, batch.env[-1]), self.pair.outer.root)
