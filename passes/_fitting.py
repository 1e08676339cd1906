"""Fitting: the least-squares solution of a unit, and of two units in a row for what the second one gives.

A unit whose value goes through nothing but ReLUs is fitted to what these should give: where that is 0, any value below
0 does. So errors are one-sided there, and least squares are repeated with what the last solution gives below 0 as the
target (networks are thinned so by Zhang et al., "Accelerating very deep convolutional networks", arXiv 1505.06798,
section 3.2).

Where an inner unit's value goes to one outer unit only (the convolutions of a residual branch, the layers of an MLP),
it matters by what the outer one makes of it. The two are solved in turn: the inner one by a damped Gauss-Newton step
on the outer one's error, with the curvature as a Kronecker product (Martens and Grosse, arXiv 1503.05671): the Gram
matrix of the inputs, and the mean of JᵀJ over positions; the outer one by least squares again.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxzip.errors import CalibrationError
from fxzip.passes._lockstep import Batch, LockStep, Stream
from fxzip.passes._units import Unit
from fxzip.passes.observe import writes_in_place
from fxzip.regression import Regression

STEPS = (2.0, 1.0, 0.5, 0.25)
"""Lengths that are tried of a Gauss-Newton step: the curvature leaves out what lies between positions."""
DAMPING = 0.1
"""Of the curvature, as a share of its mean eigenvalue."""
ONE_SIDED = 2
"""How often the targets of a one-sided fit are set again."""

Target = Callable[[str, Sequence[Tensor]], Tensor]
Goal = Callable[[Batch], Tensor]


@dataclass(eq=False)
class Fit:
    """A unit's solution, and what it takes to solve it again.

    Attributes:
        unit: The unit.
        sums: Of its inputs and targets.
        drawn: The samples that were taken of each batch; None for all.
        prior: W₀, (groups, o, d).
        sizes: How many of the d inputs each layer has.
        weights: (groups, o, d).
        bias: (groups, o).
    """

    unit: Unit
    sums: Regression
    drawn: list[Tensor | None]
    prior: Tensor
    sizes: list[int]
    weights: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """Two units in a row.

    Attributes:
        inner: The unit whose value only the outer one uses.
        outer: The unit that it is for.
        path: The nodes from the inner root (which is left out) to the outer root, and all that the outer unit claims.
    """

    inner: Unit
    outer: Unit
    path: tuple[fx.Node, ...]

    @property
    def reads(self) -> set[fx.Node]:
        """The nodes outside whose values the two are computed from."""
        mine = {*self.path, *self.inner.claimed}
        return {source for node in mine for source in node.all_input_nodes if source not in mine}


def find_pairs(module: fx.GraphModule, units: Iterable[Unit]) -> list[Pair]:
    """The units whose values go to one other unit only, each with that one."""
    owner = {node: unit for unit in units for node in unit.claimed}
    found = (_pair(module, unit, owner) for unit in dict.fromkeys(owner.values()))
    return [pair for pair in found if pair is not None]


def _pair(module: fx.GraphModule, inner: Unit, owner: dict[fx.Node, Unit]) -> Pair | None:
    outer: Unit | None = None
    path: set[fx.Node] = set()
    pending = list(inner.root.users)
    while pending:
        node = pending.pop()
        if node in path:
            continue
        here = owner.get(node)
        if node.op == "output" or (here is not None and outer not in (None, here)):
            return None
        path.add(node)
        outer = here or outer
        if here is None or node is not here.root:
            pending += node.users
    if outer is None or any(writes_in_place(node, module) for node in path):  # the path is run many times
        return None
    path |= outer.claimed
    return Pair(inner, outer, tuple(node for node in module.graph.nodes if node in path))


class Fitter:
    """Fits units of the merged network while all networks stand at their roots.

    Attributes:
        lock: The lock step; the merged network is its last.
        target: What a node should give, from the parents' values.
        ridge: λ as a share of the mean of the inputs' sums of squares.
        samples: Positions that a unit is fitted on.
    """

    def __init__(self, lock: LockStep, target: Target, ridge: float, samples: int, seed: int) -> None:
        self.lock, self.target, self.ridge, self.samples = lock, target, ridge, samples
        self.generator = torch.Generator().manual_seed(seed)
        self._orders: dict[Unit, list[fx.Node]] = {}

    @property
    def _merged(self) -> Stream:
        return self.lock.streams[-1]

    def fit(self, unit: Unit) -> Fit:
        """Solve a unit for its target, and write its weights.

        Raises:
            CalibrationError: Its inputs or targets are not finite.
        """
        priors = [layer.prior(self._merged.module) for layer in unit.layers]
        sums, sizes, empty = Regression(unit.bias_at is not None), [prior.shape[2] for prior in priors], torch.empty(0)
        found = Fit(unit, sums, self._draw(unit), torch.cat(priors, 2), sizes, empty, empty)
        self._solve(found, lambda batch: self.goal(batch, unit))
        if self._one_sided(unit):
            for _ in range(ONE_SIDED):
                found.sums.forget_targets()
                self._solve(found, lambda batch: self._next_goal(batch, unit))
        return found

    def goal(self, batch: Batch, unit: Unit, has: Tensor | None = None) -> Tensor:
        """What a unit should give at its root, where it gives ``has``, if that is known."""
        values = [env[unit.root.name] for env in batch.env[:-1]]
        if not self._one_sided(unit):
            return self.target(unit.root.name, values)
        wanted = self.target(unit.root.name, [value.relu() for value in values])
        below = self.target(unit.root.name, values) if has is None else has
        return torch.where(wanted > 0, wanted, below.clamp(max=0))

    def _next_goal(self, batch: Batch, unit: Unit) -> Tensor:
        """What a unit should give, now that it is solved."""
        return self.goal(batch, unit, self._run(batch, unit) if self._one_sided(unit) else None)

    def alternate(self, pair: Pair, inner: Fit, outer: Fit, rounds: int) -> None:
        """Solve two units in turn for what the outer one gives."""
        for _ in range(rounds):
            if not self._step(pair, inner):
                break
            outer.sums = Regression(outer.sums.intercept)
            self._solve(outer, lambda batch: self._next_goal(batch, pair.outer))

    def _solve(self, fit: Fit, goal: Goal) -> None:
        """Least squares for what a unit should give; inputs that are known already count with the new targets."""
        first = fit.unit.layers[0].contraction
        again = fit.sums.count > 0
        for batch, here in zip(self.lock.seen, fit.drawn, strict=True):
            wanted = goal(batch)
            for node in fit.unit.known:
                wanted = wanted - batch.env[-1][node.name]
            x, t = _columns(fit.unit, batch, here), _precise(first.rows(wanted, here))
            fit.sums.add_targets(x, t) if again else fit.sums.add(x, t)
        try:
            self._write(fit, *fit.sums.solve(fit.prior, self.ridge))
        except ArithmeticError as error:
            raise CalibrationError(f"refit at {fit.unit.root.name}: {error}") from error

    def _write(self, fit: Fit, weights: Tensor, bias: Tensor) -> None:
        fit.weights, fit.bias = weights, bias
        for layer, part in zip(fit.unit.layers, weights.split(fit.sizes, 2), strict=True):
            layer.write(self._merged.module, part, bias if layer is fit.unit.bias_at else None)
        self._merged.reload()

    def _step(self, pair: Pair, inner: Fit) -> bool:
        """A Gauss-Newton step of the inner unit; whether it made the outer one's error smaller."""
        old = inner.weights, inner.bias
        found = self._gradients(pair, inner)
        if found is None:
            return False
        starts, curvature = found
        turned = _curved(inner.sums.solve(torch.zeros_like(inner.prior), self.ridge), curvature)
        self._write(inner, old[0] + turned[0], old[1] + turned[1])
        length = self._length(pair, starts)
        self._write(inner, old[0] + length * turned[0], old[1] + length * turned[1])
        if length:
            for batch in self.lock.seen:
                value = self._run(batch, pair.inner)
                self._forward(pair, batch, value, batch.env[-1])
        return length > 0

    def _gradients(self, pair: Pair, inner: Fit) -> tuple[list[tuple[Batch, Tensor]], Tensor] | None:
        """Add up the gradients of the outer error by the inner value.

        Returns:
            The inner value of each batch, and the mean of JᵀJ over positions (groups, o, o), by random probes; None
            where no gradient comes through.
        """
        inner.sums.forget_targets()
        first, starts = pair.inner.layers[0].contraction, []
        curvature: Tensor | None = None
        for batch, here in zip(self.lock.seen, inner.drawn, strict=False):
            start = self._run(batch, pair.inner)
            with torch.enable_grad():
                value = start.detach().requires_grad_()
                has = self._forward(pair, batch, value)
            error = self.goal(batch, pair.outer, has.detach()) - has.detach()
            probe = torch.randint(2, has.shape, generator=self.generator).to(error) * 2 - 1
            gradient, probed = (_pulled_back(has, value, by) for by in (error, probe * (error != 0)))
            if gradient is None or probed is None:
                return None
            inner.sums.add_targets(_columns(pair.inner, batch, here), _precise(first.rows(gradient, here)))
            rows = _precise(first.rows(probed, here))
            part = (rows @ rows.mT).double()
            curvature = part if curvature is None else curvature + part
            starts.append((batch, start))
        assert curvature is not None
        return starts, curvature / inner.sums.count

    def _length(self, pair: Pair, starts: Sequence[tuple[Batch, Tensor]]) -> float:
        """The length of a step that leaves the least error on every second batch; 0 where none is better."""
        errors = dict.fromkeys((0.0, *STEPS), 0.0)
        for batch, start in starts[::2]:
            change = self._run(batch, pair.inner) - start
            for length in errors:
                has = self._forward(pair, batch, start + length * change)
                errors[length] += float((self.goal(batch, pair.outer, has) - has).double().square().sum())
        return min(errors, key=errors.__getitem__)

    def _forward(self, pair: Pair, batch: Batch, value: Tensor, into: dict[str, Tensor] | None = None) -> Tensor:
        """The outer unit's value for an inner value; what lies between goes ``into`` a dict."""
        fresh = {pair.inner.root.name: value} if into is None else into
        fresh[pair.inner.root.name] = value
        return self._compute(pair.path, ChainMap(fresh, batch.env[-1]), pair.outer.root)

    def _run(self, batch: Batch, unit: Unit) -> Tensor:
        """What a unit gives."""
        if unit not in self._orders:
            self._orders[unit] = [node for node in self._merged.module.graph.nodes if node in unit.claimed]
        return self._compute(self._orders[unit], ChainMap({}, batch.env[-1]), unit.root)

    def _compute(self, nodes: Iterable[fx.Node], env: ChainMap[str, Tensor], last: fx.Node) -> Tensor:
        for node in nodes:
            if node.op != "get_attr":
                env[node.name] = self._merged.compute(node.name, env)
        return env[last.name]

    def _one_sided(self, unit: Unit) -> bool:
        users = unit.root.users
        return bool(users) and all(_is_relu(self._merged.module, user) for user in users)

    def _draw(self, unit: Unit) -> list[Tensor | None]:
        """The samples of each batch to take, drawn at random; None for all, where they are not too many."""
        share = -(-2 * self.samples // self.lock.active)
        counts = [unit.layers[0].contraction.samples(batch.env[0][unit.root.name]) for batch in self.lock.seen]
        device = self.lock.seen[0].env[0][unit.root.name].device
        return [
            None if count <= share else torch.randperm(count, generator=self.generator)[:share].to(device)
            for count in counts
        ]


def _pulled_back(has: Tensor, value: Tensor, by: Tensor) -> Tensor | None:
    """Jᵀ ``by``, with J of ``has`` by ``value``; None where it does not hang on it smoothly."""
    if not has.requires_grad:
        return None
    return torch.autograd.grad(has, value, by, retain_graph=True, allow_unused=True)[0]


def _curved(step: tuple[Tensor, Tensor], curvature: Tensor) -> tuple[Tensor, Tensor]:
    """A step of weights (groups, o, d) and bias (groups, o), by the inverse of a curvature (groups, o, o)."""
    mean = curvature.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = curvature + (DAMPING * mean + 1e-30) * torch.eye(curvature.shape[1]).to(curvature)
    both = torch.linalg.solve(damped, torch.cat([step[0], step[1][:, :, None]], 2))
    return both[:, :, :-1], both[:, :, -1]


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.ReLU)
    return node.target in (F.relu, torch.relu, "relu")


def _columns(unit: Unit, batch: Batch, here: Tensor | None) -> Tensor:
    """The inputs of a unit's layers (groups, d, samples)."""
    parts = [layer.contraction.columns(batch.env[-1][layer.source.name], here) for layer in unit.layers]
    return _precise(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def _precise(tensor: Tensor) -> Tensor:
    """Sums of products want float32 at the least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
