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
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

STEPS = (2.0, 1.0, 0.5, 0.25)
"""Lengths that are tried for a Gauss-Newton step: the curvature ignores how positions act on one another."""
PROBED = 4
"""They are tried on one of this many batches."""
LITTLE = 0.005
"""Share of the outer error below which what a step gains is not worth another one."""


@dataclass(frozen=True)
class Rounds:
    """Betters pairs of units.

    Attributes:
        fitter: Solves and runs single units.
    """

    fitter: Fitter

    def run(self, pair: Pair, inner: Fit, outer: Fit, rounds: int) -> None:
        """Better both in turn, on some of the batches each time, and the outer one on all of them at the end."""
        seen, stride = self.fitter.lock.seen, self._stride(pair)
        moved = False
        for number in range(rounds):
            some = [batch for batch in seen if batch.place % stride == number % stride]
            gain = self._step(pair, inner, some, stride)
            if not gain:
                break
            moved = True
            self.fitter.step(outer, some, changed=True, stride=stride)
            if gain < LITTLE:
                break
        if moved and stride > 1:
            self._renew(pair, seen)
            self.fitter.step(outer, seen, changed=True)

    def _stride(self, pair: Pair) -> int:
        """One batch of how many has samples enough for a step."""
        root, count = pair.outer.root, pair.outer.layers[0].contraction.samples
        own = sum(count(batch.env[0][root.name]) for batch in self.fitter.lock.seen)
        (samples,) = map(int, self.fitter.lock.processes.numbers("samples", own))
        enough = max(gram_samples(pair.inner), gram_samples(pair.outer))
        return min(max(samples // enough, 1), self.fitter.lock.taken)

    def _step(self, pair: Pair, inner: Fit, batches: Sequence[Batch], stride: int) -> float:
        """A Gauss-Newton step of the inner unit; by what share it made the outer one's error smaller."""
        found = self._gradients(pair, batches, stride)
        if found is None:
            return 0.0
        starts, residuals, curvature, least = found
        step = self.fitter.agreed(
            lambda: curved(inner.inputs.step(residuals, inner.ridge, told=inner.told), curvature, least)
        )
        errors: dict[float, float] = {}

        def best_length() -> float:
            errors.update(self._errors(pair, starts))
            return min(errors, key=errors.__getitem__)

        length = self.fitter.move(inner, step, best_length)
        if length:
            self._renew(pair, batches)
        return 1 - errors[length] / errors[0.0] if length else 0.0

    def _renew(self, pair: Pair, batches: Iterable[Batch]) -> None:
        """Compute anew what a pair gives, after its inner unit changed."""
        for batch in batches:
            self._forward(pair, batch, self.fitter.run(batch, pair.inner), batch.env[-1])

    def _gradients(
        self, pair: Pair, batches: Sequence[Batch], stride: int
    ) -> tuple[list[tuple[Batch, Tensor]], Residuals, Tensor, float] | None:
        """Add up the gradients of the outer error by the inner value.

        Returns:
            The inner value of some batches, the gradients, the mean of JᵀJ over positions (groups, o, o) by random
            probes, and what it would be if the inner value made hardly anything (`SLIGHT`) of the outer one; None where
            no gradient comes through.
        """
        contraction, residuals, starts = pair.inner.layers[0].contraction, Residuals(), []
        curvature, probes, lost = torch.zeros((), dtype=torch.float64), 0, False
        sizes = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            start = self.fitter.run(batch, pair.inner)
            with torch.enable_grad():
                value = start.detach().requires_grad_()
                has = self._forward(pair, batch, value)
            residual = self.fitter.goals.residual(batch, pair.outer, has.detach())
            gradient = pulled_back(has, value, residual)
            if gradient is None:
                lost = True
                break
            sizes += torch.stack([power(self.fitter.goals.wanted(batch, pair.outer)), power(start)]).cpu()
            add_residuals(residuals, pair.inner, batch, gradient)
            if batch.place // stride % PROBED == 0:
                starts.append((batch, start))
                probe = torch.randint(2, has.shape, generator=batch.generator).to(residual) * 2 - 1
                probed = pulled_back(has, value, probe * (residual != 0))
                assert probed is not None
                rows = precise(contraction.rows(probed, self.fitter.draw(pair.inner, batch, probed)))
                curvature = curvature + (rows @ rows.mT).double()
                probes += rows.shape[2]
        if any(self.fitter.lock.processes.numbers("gradients", lost)):
            return None
        curved_by = [curvature, torch.tensor(probes, dtype=torch.float64)] if probes else None
        curvature, probed_at = self.fitter.lock.total("curvature", curved_by)
        (sizes,) = self.fitter.lock.total("sizes", [sizes])
        least = float(SLIGHT**2 * sizes[0] / sizes[1].clamp(min=1e-300))
        return starts, self.fitter.shared(residuals), curvature / probed_at.to(curvature), least

    def _errors(self, pair: Pair, starts: Sequence[tuple[Batch, Tensor]]) -> dict[float, float]:
        """The outer error by the length of an inner step, that of 0 first: it wins where none is better."""
        errors = dict.fromkeys((0.0, *STEPS), 0.0)
        for batch, start in starts:
            change = self.fitter.run(batch, pair.inner) - start
            for length in errors:
                has = self._forward(pair, batch, start + length * change)
                residual = self.fitter.goals.residual(batch, pair.outer, has)
                errors[length] += float(residual.double().square().sum())
        totals = self.fitter.lock.processes.numbers("errors", *errors.values())
        return dict(zip(errors, totals, strict=True))

    def _forward(self, pair: Pair, batch: Batch, value: Tensor, into: dict[str, Tensor] | None = None) -> Tensor:
        """The outer unit's value for an inner value; what lies between goes ``into`` a dict."""
        fresh = {} if into is None else into
        fresh[pair.inner.root.name] = value
        return self.fitter.compute(pair.path, ChainMap(fresh, batch.env[-1]), pair.outer.root)
