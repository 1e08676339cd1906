"""Fitting: the least-squares solution of a unit.

A unit is solved by steps: its residuals over all samples, times its inputs, times the inverse of their
Gram matrix. Products of residuals with inputs are cheap; the Gram matrix is not, so it is taken once and of some
samples. With all of them one step is the solution, with some a second one comes close to it.

A unit whose value goes through nothing but ReLUs is fitted to what these should give: where that is 0, any value below
0 does. So errors are one-sided there, and steps are repeated with the residuals of the last solution (networks are
thinned so by Zhang et al., "Accelerating very deep convolutional networks", arXiv 1505.06798, section 3.2).

Where an inner unit's value goes to one outer unit only (the convolutions of a residual branch, the layers of an MLP),
it matters by what the outer one makes of it: the two are solved in turn (`fxzip.passes.refit.rounds`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import reduce
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxzip.data.loops import device_of
from fxzip.errors import CalibrationError
from fxzip.passes.refit.fit import Fit
from fxzip.passes.refit.goals import Goals, Target
from fxzip.passes.refit.layers import ANEW
from fxzip.passes.refit.lockstep import Batch, LockStep, Stream
from fxzip.passes.refit.pairs import Pair
from fxzip.passes.refit.regression import Regression, Residuals
from fxzip.passes.refit.reset import norm_behind, reset_scale
from fxzip.passes.refit.ridge import START, Spread, Trial
from fxzip.passes.refit.rounds import FARTHEST, PROBED, Rounds
from fxzip.passes.refit.sums import add_residuals, columns, gram_samples, precise
from fxzip.passes.refit.systems import noise_of
from fxzip.passes.refit.units import Unit
from fxzip.settings import RefitOptions

Sums = TypeVar("Sums", Residuals, Spread)
Found = TypeVar("Found")

WEIGHTS = "solving a layer"
FAR_NEARER = 100
"""How many times the error a layer must have with its statistics reset to be held to its weights as they are. (A mean
of unlike channels varies too little, which keeps its error small and is what resetting is to put right.)"""


class Samples(NamedTuple):
    """Samples of a unit at W₀.

    Attributes:
        trial: Of its inputs and of its residuals.
        made: How much its layers' outputs vary.
        whole: Whether the trial's are all there are.
    """

    trial: Trial
    made: Spread
    whole: bool


class Fitter:
    """Fits units of the merged network while all networks stand at their roots.

    Attributes:
        lock: The lock step; the merged network is its last.
        goals: What units should give.
        options: How they are fitted.
        last: The λ that was found last.
        number: How many units were solved; what is drawn for one depends on it, and not on the units' names.
    """

    def __init__(self, lock: LockStep, target: Target, options: RefitOptions) -> None:
        self.lock, self.goals, self.options = lock, Goals(lock, target), options
        self.last, self.number = START, 0
        self._orders: dict[Unit, list[fx.Node]] = {}

    @property
    def _merged(self) -> Stream:
        return self.lock.streams[-1]

    def solve(self, unit: Unit, pairs: Mapping[Pair, Fit], rounds: int) -> Fit:
        """Solve a unit for its target, and better inner units and it in turn; their weights are written.

        Args:
            unit: The unit.
            pairs: The inner units that it is the outer one of, as they were solved.
            rounds: How often to better each.

        Raises:
            CalibrationError: Its inputs or targets are not finite.
        """
        for batch in self.lock.seen:
            batch.sow(self.options.seed, self.number)
        self.number += 1
        found = self._fit(unit)
        for pair, inner in pairs.items():
            Rounds(self, pair, inner, found).run(rounds)
        self.goals.forget()
        return found

    def restore(self, unit: Unit, weights: Tensor, bias: Tensor, ridge: float) -> None:
        """Write a unit's weights (groups, o, d) and bias (groups, o) that were found before, and the λ after it."""
        sizes = [layer.prior(self._merged.module).shape[2] for layer in unit.layers]
        device = device_of(self._merged.module)
        found, bias = weights.to(device), bias.to(device)
        self._write(Fit(unit, Regression(unit.bias_at is not None), found, sizes, found, bias), found, bias)
        self.last, self.number = ridge, self.number + 1

    def _fit(self, unit: Unit) -> Fit:
        found, (trial, made, whole) = self._held_to(unit)
        self.goals.forget_linear()
        found.inputs = trial.together()
        ridge = self.options.ridge
        if ridge is None:
            ridge = self.last = self.agreed(lambda: trial.best(self.last))
        found.ridge = ridge
        found.told = self._told(unit, made)
        self.move(found, self._asked(found, trial.residuals))
        for _ in range(max(self.options.steps if self.goals.one_sided(unit) else 0, 1 - whole)):
            self.step(found, self.lock.seen)
        return found

    def _held_to(self, unit: Unit) -> tuple[Fit, Samples]:
        """A fit that is at W₀, and its samples.

        W₀ has its BatchNorm statistics reset, unless it is far nearer to the parents as it is: what is exact stays so.
        """
        module = self._merged.module
        plain = [layer.prior(module) for layer in unit.layers]
        norms = {layer: norm for layer in unit.layers if (norm := norm_behind(module, layer)) is not None}
        if norms:
            values, as_it_is = self._before_norms(unit, set(norms.values()))
            scales = [
                reset_scale(module, layer, norms[layer], values[norms[layer]], self.lock.total)
                if layer in norms
                else None
                for layer in unit.layers
            ]
            reset = [w if s is None else w * s[:, :, None] for w, s in zip(plain, scales, strict=True)]
            found = self._started(unit, reset)
            samples = self._samples(found)
            if samples.trial.error.total <= FAR_NEARER * as_it_is:
                return found, samples
        found = self._started(unit, plain)
        return found, self._samples(found)

    def _before_norms(self, unit: Unit, norms: Set[fx.Node]) -> tuple[dict[fx.Node, list[Tensor]], float]:
        """What goes into BatchNorms on each batch, and the unit's error as it is, but for its bias."""
        values: dict[fx.Node, list[Tensor]] = {norm: [] for norm in norms}
        error = Spread()
        for batch in self.lock.seen:
            env = ChainMap({}, batch.env[-1])
            has = self.run(batch, unit, env)
            error.add(unit.layers[0].contraction.rows(precise(self.goals.linear(batch, unit, has))))
            for norm, found in values.items():
                found.append(env[norm.all_input_nodes[0].name])
        return values, self.shared(error).total

    def _samples(self, fit: Fit) -> Samples:
        """Samples of a unit's inputs and of its residuals at W₀."""
        unit, whole, made = fit.unit, True, Spread()
        trial, contraction = Trial(unit.bias_at is not None, self.options.ridge is None), unit.layers[0].contraction
        for batch in self.lock.seen:
            value = batch.env[0][unit.root.name]
            drawn, count = self.draw(unit, batch, value), contraction.samples(value)
            whole = whole and drawn is None
            has = self.run(batch, unit)
            made.add(precise(contraction.rows(reduce(torch.sub, (batch.env[-1][n.name] for n in unit.known), has))))
            rows = precise(contraction.rows(self.goals.linear(batch, unit, has)))
            trial.error.add(rows)
            here = torch.arange(count, device=value.device) if drawn is None else drawn
            for left_out, mine in trial.parts(batch.first + here * batch.images // count):
                some = here[mine]
                trial.add(left_out, columns(unit, batch, some), rows[:, :, some])
        if self.lock.processes.count == 1:
            return Samples(trial, made, whole)
        (drawn_from,) = self.lock.processes.numbers("samples", not whole)
        trial = trial.over_all(self.lock.processes, device_of(self._merged.module), self._dtype(unit))
        return Samples(trial, self.shared(made), not drawn_from)

    def _started(self, unit: Unit, priors: Sequence[Tensor]) -> Fit:
        """A fit that is at these weights, with the bias that is best for the first batch."""
        prior = torch.cat(list(priors), 2)
        sizes, inputs = [part.shape[2] for part in priors], Regression(unit.bias_at is not None)
        found = Fit(unit, inputs, prior, sizes, prior, prior.new_zeros(prior.shape[:2]))
        self._write(found, prior, found.bias)
        if inputs.intercept:
            first = self.lock.first
            (bias,) = self.lock.total("a bias", None if first is None else [self._mean_residual(first, unit)])
            self._write(found, prior, bias)
        return found

    def _mean_residual(self, batch: Batch, unit: Unit) -> Tensor:
        """The mean of the residual of a unit's value on a batch: (groups, o), float64."""
        contraction = unit.layers[0].contraction
        residual = contraction.rows(self.goals.linear(batch, unit, self.run(batch, unit)))
        return residual.mean(2, dtype=torch.float64)

    def _told(self, unit: Unit, made: Spread) -> Tensor:
        """The outputs (groups, o) that depend on the inputs: under W₀ they vary by more than rounding, or have none."""
        if any(ANEW in layer.node.meta for layer in unit.layers):
            return torch.ones_like(made.each, dtype=torch.bool)
        first, power = unit.layers[0].contraction, torch.zeros((), dtype=torch.float64)
        for batch in self.lock.seen:
            wanted = precise(self.goals.wanted(batch, unit))
            power = power + first.total_output(wanted.square()).double()
        (power,) = self.lock.total("what is wanted", [power] if self.lock.seen else None)
        return self.agreed(lambda: made.each > noise_of(self._dtype(unit)) ** 2 * power)

    def step(self, fit: Fit, batches: Sequence[Batch], changed: bool = False, stride: int = 1) -> None:
        """A step of least squares on the residuals.

        Args:
            fit: The fit to better.
            batches: What the residuals are taken on.
            changed: Whether its inputs, and so its value, were computed anew since their Gram matrix was: then the
                length of the step is found, too.
            stride: One of how many batches they are.
        """
        residuals, some = Residuals(), []
        for batch in batches:
            has = batch.env[-1][fit.unit.root.name] if changed else self.run(batch, fit.unit)
            here = self.goals.residual(batch, fit.unit, has)
            add_residuals(residuals, fit.unit, batch, here)
            if changed and batch.place // stride % PROBED == 0:
                some.append((batch, has, here))
        self.move(
            fit, self._asked(fit, self.shared(residuals)), lambda: self._best_length(fit.unit, some) if changed else 1.0
        )

    def _asked(self, fit: Fit, residuals: Residuals) -> tuple[Tensor, Tensor]:
        """The step of weights and bias that residuals ask for."""
        try:
            return self.agreed(lambda: fit.inputs.step(residuals, fit.ridge, fit.prior - fit.weights, fit.told))
        except ArithmeticError as error:
            raise CalibrationError(f"refit at {fit.unit.root.name}: {error}") from error

    def move(self, fit: Fit, step: tuple[Tensor, Tensor], length: Callable[[], float] = lambda: 1.0) -> float:
        """Take a step of a length that is found once a whole one is taken; returns the length."""
        old = fit.weights, fit.bias
        self._write(fit, old[0] + step[0], old[1] + step[1])
        found = length()
        if found != 1:
            self._write(fit, old[0] + found * step[0], old[1] + found * step[1])
        return found

    def _best_length(self, unit: Unit, before: Sequence[tuple[Batch, Tensor, Tensor]]) -> float:
        """The length of a step with the least error, from the unit's values and residuals before it."""
        explained = moved = 0.0
        for batch, had, residual in before:
            change = (self.run(batch, unit) - had).double()
            explained += float((change * residual).sum())
            moved += float(change.square().sum())
        explained, moved = self.lock.processes.numbers("the length of a step", explained, moved)
        return min(max(explained / max(moved, 1e-30), 0.0), FARTHEST)

    def _write(self, fit: Fit, weights: Tensor, bias: Tensor) -> None:
        fit.weights, fit.bias = weights, bias
        for layer, part in zip(fit.unit.layers, weights.split(fit.sizes, 2), strict=True):
            layer.write(self._merged.module, part, bias if layer is fit.unit.bias_at else None)
        self._merged.reload()

    def run(self, batch: Batch, unit: Unit, into: ChainMap[str, Tensor] | None = None) -> Tensor:
        """What a unit gives; what lies on the way goes ``into`` a dict."""
        if unit not in self._orders:
            self._orders[unit] = [node for node in self._merged.module.graph.nodes if node in unit.claimed]
        return self.compute(self._orders[unit], ChainMap({}, batch.env[-1]) if into is None else into, unit.root)

    def compute(self, nodes: Iterable[fx.Node], env: ChainMap[str, Tensor], last: fx.Node) -> Tensor:
        """What the last of some nodes gives, in their order; all of them go into ``env``."""
        for node in nodes:
            if node.op != "get_attr":
                env[node.name] = self._merged.compute(node.name, env)
        return env[last.name]

    def draw(self, unit: Unit, batch: Batch, value: Tensor) -> Tensor | None:
        """Samples of a batch for a Gram matrix, drawn at random; None for all, where they are not too many."""
        share = -(-gram_samples(unit) // self.lock.taken)
        count = unit.layers[0].contraction.samples(value)
        return None if count <= share else torch.randperm(count, generator=batch.generator)[:share].to(value.device)

    def agreed(self, find: Callable[[], Found]) -> Found:
        """What the first process finds, for all: tensors on the device of the merged network."""
        found, device = self.lock.processes.agreed(WEIGHTS, find), device_of(self._merged.module)
        if self.lock.processes.count > 1:
            found = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), found)
        return found

    def shared(self, own: Sums) -> Sums:
        """Sums over all processes."""
        return own if self.lock.processes.count == 1 else own.over_all(self.lock.total)

    def _dtype(self, unit: Unit) -> torch.dtype:
        """What sums of a unit's products are taken in."""
        weight = self._merged.module.get_parameter(unit.layers[0].weight)
        return torch.promote_types(weight.dtype, torch.float32)
