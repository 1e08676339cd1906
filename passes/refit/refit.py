"""Refit: closed-form least squares of the merged weights, layer by layer, on the merged network's own inputs.

Parents and merged network run in lock step over the calibration images, node by node. At each layer

    W* = argmin Σ ‖T - W X - b‖² + λ ‖W - W₀‖²

with X the layer's input *in the merged network*, as the layers before were refitted, and T = M [z_1; ...; z_N] the
parents' values under the space's map: errors are corrected as they arise. A layer is whatever is linear in its
weights (`fxzip.contraction`), as a module or as a function. BatchNorms and scales behind one are folded into it.
Where layers end in a sum (a residual add, a downsampling shortcut beside a convolution) they are solved together, for
the parents' sum minus what the merged network's skip carries. W₀ is the paper's rule, so what the images do not
determine stays as it was, and a merge that is exact already stays exact. Norms that stand alone get the scale and
shift that fit best (REPAIR, arXiv 2211.08403, in closed form). The layers of a head are refitted to its own parent's
values. No labels are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from fxzip.data.bars import Shown
from fxzip.data.calibration import Images, read_images
from fxzip.data.loops import counted, device_of
from fxzip.errors import FewImagesWarning
from fxzip.graphs import bind_inputs, drop_dead_code, drop_unused
from fxzip.journal import NONE, Journal
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.refit.fit import Fit
from fxzip.passes.refit.fitting import Fitter
from fxzip.passes.refit.goals import Target
from fxzip.passes.refit.kept import Placed, find_norms, put_back, settle
from fxzip.passes.refit.lockstep import LockStep, Step, Stream
from fxzip.passes.refit.norms import Norm, find_norm
from fxzip.passes.refit.pairs import Pair, find_pairs
from fxzip.passes.refit.records import Records
from fxzip.passes.refit.slots import Uses
from fxzip.passes.refit.sums import width
from fxzip.passes.refit.targets import Targets
from fxzip.passes.refit.units import Unit, find_units, first_units
from fxzip.passes.split import Split
from fxzip.passes.split.stems import STEM
from fxzip.settings import RefitOptions


def refit(
    parts: Split, plan: MergePlan, loader: Iterable[Any] | Images, options: RefitOptions | None = None,
    progress: Shown = True, whole_heads: bool = True, journal: Journal = NONE, names: Sequence[str] = (),
) -> int:  # fmt: skip
    """Refit trunk and heads in place; returns how many layers were solved.

    The loader is read once. Memory is that of the inputs, of the tensors that are alive at one node in all networks
    (for ``options.samples`` positions, and mostly less than ``options.memory``), and of the largest Gram matrix.

    Args:
        parts: What `fxzip.passes.split` built, by the paper's rule.
        plan: What they were built from.
        loader: The calibration images; or what `read_images` kept of them, which several processes may share.
        options: See `RefitOptions`.
        progress: Show a bar.
        whole_heads: False: of the heads, only the layers are solved that read what the trunk gives.
        journal: Keeps the layers that were solved, and has those of a run that was interrupted.
        names: The tasks.
    """
    options = options or RefitOptions()
    images = loader
    if not isinstance(images, Images):
        images = read_images(images, device_of(parts.trunk) or device_of(parts.heads[0]), options)
    progress = progress if images.processes.leads else False
    trunk = _trunk_refitter(parts, plan, images, options)
    trunk.run(progress, "refitting the trunk", Records(journal, "trunk"))
    solved, few, placed = trunk.solved, trunk.few, trunk.placed
    crossing = [plan.name(i) for i in plan.crossing]
    for model, head in enumerate(parts.heads):
        own = [plan.name(i, model) for i in plan.crossing]
        feeds = [
            [{mine: env[name] for name, mine in zip(crossing, own, strict=True)} for env in (b.env[model], b.env[-1])]
            for b in trunk.lock.seen
        ]
        pair = [Stream(plan.alignment.modules[model], {}), Stream(head, {})]
        # A head has the parent's width, so its first round leaves little.
        once = replace(options, rounds=min(options.rounds, 1))
        seen = images.upto(trunk.lock.active)
        run = _Refitter(pair, feeds, lambda _, values: values[0], once, set(), seen, whole=whole_heads)
        which = f"the head of {names[model]}" if names else f"head {model}"
        run.run(progress, f"refitting {which}", Records(journal, f"head{model}"))
        solved += run.solved
        few |= run.few
        placed += run.placed
    if placed:
        settle(parts, placed, images)
    if few:
        _warn_of_few(images.count, few)
    return solved


def refit_rest(
    merged: fx.GraphModule, parent: fx.GraphModule, before: Sequence[fx.Node], images: Images, options: RefitOptions,
    progress: Shown = False, whole: bool = True,
) -> int:  # fmt: skip
    """Refit a network in place to what its one parent gives behind some of its nodes; returns how many layers.

    Args:
        merged: The network; what is marked as a stem (`fxzip.passes.split.stems`) stays as it is.
        parent: The parent, whose nodes it has the names of.
        before: The parent's nodes that it does not have.
        images: The calibration images.
        options: See `RefitOptions`.
        progress: Show a bar.
        whole: False: only the layers are solved that read nothing of another one's.
    """
    feeds = []
    for args, kwargs in images.own:
        pairs = [bind_inputs(module, args, kwargs) for module in (parent, merged)]
        feeds.append([{node.name: value for node, value in given.items()} for given in pairs])
    streams = [Stream(parent, {}), Stream(merged, {})]
    run = _Refitter(streams, feeds, lambda _, values: values[0], options, set(), images, before, whole=whole)
    run.run(progress, "refitting what goes on", Records(NONE, "rest"))
    if run.placed:
        settle(Split(merged, ()), run.placed, images)
    if run.few:
        _warn_of_few(images.count, run.few)
    return run.solved


def _trunk_refitter(parts: Split, plan: MergePlan, images: Images, options: RefitOptions) -> _Refitter:
    """The parents and the trunk in lock step."""
    streams = [
        Stream(module, {plan.name(i): name for name, i in plan.places(model).items()})
        for model, module in enumerate(plan.alignment.modules)
    ]
    streams.append(Stream(parts.trunk, {}))
    bound = [bind_inputs(parts.trunk, args, kwargs) for args, kwargs in images.own]
    feeds = [[{node.name: value for node, value in values.items()}] * len(streams) for values in bound]
    before = [n for n in plan.alignment.modules[0].graph.nodes if plan.places(0).get(n.name, plan.begin) < plan.begin]
    keep, unknown = {plan.name(i) for i in plan.crossing}, plan.spec.layout.bundles
    return _Refitter(streams, feeds, Targets(plan), options, keep, images, before, unknown)


def _warn_of_few(images: int, few: Mapping[str, tuple[int, int]]) -> None:
    """Warn of the layers with too few images, those with the greatest lack first."""
    worst = sorted(few.items(), key=lambda item: item[1][0] / item[1][1])
    shown = [f"{name} ({samples:,} samples for {inputs:,} inputs)" for name, (samples, inputs) in worst]
    rest = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    warnings.warn(
        f"{images} image{'s are' if images != 1 else ' is'} not enough for {', '.join(shown[:3])}{rest}: "
        "what they do not determine keeps its values from before the fit; give more images",
        FewImagesWarning,
        stacklevel=2,
    )


class _Refitter:
    """Solves the layers of the last of several networks that run in lock step.

    Attributes:
        merged: The network that is refitted, in place.
        target: What a node of it should give, from the parents' values.
        before: The parents' nodes, by the first one's, that come before what is merged.
        unknown: The nodes of which it is not known where their channels lie: ``target`` says nothing of them.
        solved: How many layers were solved for.
        few: The layers with fewer samples than inputs, and how many of both.
        units: What is solved: all, or with ``whole=False`` only what reads no other's result.
        placed: The BatchNorms that were folded and put back; they do nothing until they are settled.
    """

    def __init__(
        self,
        streams: list[Stream],
        feeds: list[list[dict[str, Any]]],
        target: Target,
        options: RefitOptions,
        keep: set[str],
        images: Images,
        before: Sequence[fx.Node] = (),
        unknown: Collection[str] = (),
        whole: bool = True,
    ) -> None:
        self.merged, self.target, self.options = streams[-1].module, target, options
        self.solved = 0
        self.few: dict[str, tuple[int, int]] = {}
        self.kept = find_norms(self.merged) if options.keep_norms else []
        self.placed: list[Placed] = []
        self.before, self.unknown = before, unknown
        self.units = [unit for unit in find_units(self.merged, options.biases) if self._has_target(unit.root)]
        if not whole:
            self.units = first_units(self.merged, self.units)
        self.inner: dict[Unit, list[Pair]] = {}
        for pair in find_pairs(self.merged, self.units) if options.rounds else ():
            self.inner.setdefault(pair.outer, []).append(pair)
        self.fits: dict[Unit, Fit] = {}
        self.lock = LockStep(streams, feeds, list(self._schedule()), keep, images)
        self.fitter = Fitter(self.lock, target, options)

    def _has_target(self, node: fx.Node) -> bool:
        return STEM not in node.meta and node.name not in self.unknown

    def run(self, progress: Shown, description: str, records: Records) -> None:
        """Solve every layer, those aside that are known already, then cut out what was folded."""
        self.records = records
        count = sum(step.solve is not None for step in self.lock.steps)
        with counted(count, progress, description) as done:
            self.lock.run(self._wanted, done)
        self.placed = put_back(self.merged, self.kept)
        for unit in self.units:
            for layer in unit.layers:
                layer.cut_out(self.merged)
        drop_dead_code(self.merged)
        drop_unused(self.merged, set(self.merged.state_dict()))

    def _schedule(self) -> Iterator[Step]:
        """The nodes in order, those of a unit's layers held back in the merged network until it is solved."""
        uses = Uses(self.merged)
        roots = {unit.root: unit for unit in self.units}
        claimed = set().union(*(unit.claimed for unit in self.units))
        parents, merged = slice(0, -1), slice(-1, None)
        early = {node.name for node in self.before}
        yield from (Step(node, parents) for node in self.before)
        for node in self.merged.graph.nodes:
            if node.op == "output":
                continue
            if STEM in node.meta or node.name in early:
                yield Step(node, merged)
                continue
            yield Step(node, parents if node in claimed else slice(None))
            free = node not in claimed and self._has_target(node)
            norm = find_norm(self.merged, node, uses, self.options.biases) if free else None
            if node in roots:
                unit = roots[node]
                samples, reads = unit.layers[0].contraction.samples, {layer.source for layer in unit.layers}
                reads = reads.union(unit.known, *(pair.reads for pair in self.inner.get(unit, ())))
                yield Step(node, solve=partial(self._solve_unit, unit), samples=samples, reads=tuple(reads))
                yield from (Step(n, merged) for n in self.merged.graph.nodes if n in unit.claimed)
            elif norm is not None:
                yield Step(node, solve=partial(self._solve_norm, norm), samples=norm.samples)

    def _wanted(self, step: Step | None) -> int:
        """How many batches more a layer needs for enough samples, if memory holds them; at the end (None) only this.

        It is as many as one process would take in, but one for each process at once at the most.
        """
        lock, found = self.lock, 0
        more = lock.held() * (1 + 1 / max(len(lock.seen), 1))  # with another batch
        told = lock.processes.everywhere("samples", (self._samples(step), more))
        samples, images = sum(count for count, _ in told), lock.images
        full = max(held for _, held in told) > self.options.memory
        each = samples / max(images, 1)
        for size in lock.sizes[lock.active : lock.active + lock.processes.count]:
            enough = full or (step is not None and samples >= self.options.samples)
            if images >= self.options.least_images and enough:
                break
            found, images, samples = found + 1, images + size, samples + round(each * size)
        return found

    def _samples(self, step: Step | None) -> int:
        """How many samples of a step this process has."""
        if step is None or step.samples is None:
            return 0
        return sum(step.samples(batch.env[0][step.node.name]) for batch in self.lock.seen)

    def _solve_unit(self, unit: Unit) -> None:
        known = self.records.known.get(self.units.index(unit))
        if known is None:
            self._solve_anew(unit)
        else:
            self.fitter.restore(unit, known.weights, known.bias, known.ridge)
        count = unit.layers[0].contraction.samples
        own = sum(count(batch.env[0][unit.root.name]) for batch in self.lock.seen)
        (samples,) = map(int, self.lock.processes.numbers("samples", own))
        if samples < width(unit):
            self.few[unit.layers[0].weight.removesuffix(".weight")] = samples, width(unit)
        self.solved += len(unit.layers)

    def _solve_anew(self, unit: Unit) -> None:
        inner = {pair: self.fits.pop(pair.inner) for pair in self.inner.get(unit, ())}
        found = self.fitter.solve(unit, inner, self.options.rounds)
        if any(unit is pair.inner for pairs in self.inner.values() for pair in pairs):
            self.fits[unit] = found
        self.records.add(self.units.index(unit), found, self.fitter.last)
        if not self.fits:
            self.records.write()

    def _solve_norm(self, norm: Norm) -> None:
        name, seen = norm.node.name, self.lock.seen
        goals = [self.target(name, [env[name] for env in batch.env[:-1]]) for batch in seen]
        values = norm.fit(self.merged, [batch.env[-1][name] for batch in seen], goals, self.lock.total)
        for batch, value in zip(seen, values, strict=True):
            batch.env[-1][name] = value
        self.lock.streams[-1].reload()
