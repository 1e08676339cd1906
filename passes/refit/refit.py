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

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxzip.data.batches import Given, batch_size
from fxzip.data.loops import batches, counted, device_of
from fxzip.errors import CalibrationError, FewImagesWarning
from fxzip.graphs import bind_inputs, drop_dead_code, drop_unused
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.refit.fit import Fit
from fxzip.passes.refit.fitting import Fitter
from fxzip.passes.refit.goals import Target
from fxzip.passes.refit.kept import Placed, find_norms, put_back, settle
from fxzip.passes.refit.lockstep import LockStep, Step, Stream
from fxzip.passes.refit.norms import Norm, find_norm
from fxzip.passes.refit.pairs import Pair, find_pairs
from fxzip.passes.refit.slots import Uses
from fxzip.passes.refit.sums import width
from fxzip.passes.refit.targets import Targets
from fxzip.passes.refit.units import Unit, find_units, first_units
from fxzip.passes.split import Split
from fxzip.passes.split.stems import STEM
from fxzip.settings import RefitOptions


def refit(
    parts: Split, plan: MergePlan, loader: Iterable[Any], options: RefitOptions | None = None, progress: bool = True,
    whole_heads: bool = True,
) -> int:  # fmt: skip
    """Refit trunk and heads in place; returns how many layers were solved.

    The loader is read once. Memory is that of the inputs, of the tensors that are alive at one node in all networks
    (for ``options.samples`` positions, and mostly less than ``options.memory``), and of the largest Gram matrix.

    Args:
        parts: What `fxzip.passes.split` built, by the paper's rule.
        plan: What they were built from.
        loader: The calibration images.
        options: See `RefitOptions`.
        progress: Show a bar.
        whole_heads: False: of the heads, only the layers are solved that read what the trunk gives.
    """
    options = options or RefitOptions()
    inputs = read_images(loader, device_of(parts.trunk) or device_of(parts.heads[0]), options)
    trunk = _trunk_refitter(parts, plan, inputs, options)
    trunk.run(progress, "refitting the trunk")
    solved, few, placed = trunk.solved, trunk.few, trunk.placed
    names = [plan.name(i) for i in plan.crossing]
    for model, head in enumerate(parts.heads):
        own = [plan.name(i, model) for i in plan.crossing]
        feeds = [
            [{mine: env[name] for name, mine in zip(names, own, strict=True)} for env in (b.env[model], b.env[-1])]
            for b in trunk.lock.seen
        ]
        pair = [Stream(plan.alignment.modules[model], {}), Stream(head, {})]
        # A head has the parent's width, so its first round leaves little.
        once = replace(options, rounds=min(options.rounds, 1))
        run = _Refitter(pair, feeds, lambda _, values: values[0], once, set(), whole=whole_heads)
        run.run(progress, f"refitting head {model}")
        solved += run.solved
        few |= run.few
        placed += run.placed
    if placed:
        settle(parts, placed, inputs)
    if few:
        _warn_of_few(sum(batch.images for batch in trunk.lock.batches), few)
    return solved


def _trunk_refitter(parts: Split, plan: MergePlan, inputs: Sequence[Any], options: RefitOptions) -> _Refitter:
    """The parents and the trunk in lock step."""
    streams = [
        Stream(module, {plan.name(i): name for name, i in plan.places(model).items()})
        for model, module in enumerate(plan.alignment.modules)
    ]
    streams.append(Stream(parts.trunk, {}))
    bound = [bind_inputs(parts.trunk, args, kwargs) for args, kwargs in inputs]
    feeds = [[{node.name: value for node, value in values.items()}] * len(streams) for values in bound]
    before = [n for n in plan.alignment.modules[0].graph.nodes if plan.places(0).get(n.name, plan.begin) < plan.begin]
    keep, unknown = {plan.name(i) for i in plan.crossing}, plan.spec.layout.bundles
    return _Refitter(streams, feeds, Targets(plan), options, keep, before, unknown)


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


def read_images(loader: Iterable[Any], device: torch.device | None, options: RefitOptions) -> list[Given]:
    """The calibration batches, up to the number of images that are wanted and as many as fit into memory.

    Raises:
        CalibrationError: The loader is empty.
    """
    found: list[Given] = []
    count, size = 0, 0
    with batches(loader, device=device, progress=False) as given:
        for args, kwargs in given:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            found.append(Given(args, kwargs))
            count += batch_size(args, kwargs)
            size += sum(tensor.nbytes for tensor in tensors)
            full = size * (1 + 1 / len(found)) > options.memory and count >= options.least_images
            if full or count >= options.images:
                break
    if not found:
        raise CalibrationError("the loader is empty: it gave no batch")
    return found


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
        self.lock = LockStep(streams, feeds, list(self._schedule()), keep)
        self.fitter = Fitter(self.lock, target, options)

    def _has_target(self, node: fx.Node) -> bool:
        return STEM not in node.meta and node.name not in self.unknown

    def run(self, progress: bool, description: str) -> None:
        """Solve every layer, then cut out what was folded."""
        count = sum(step.solve is not None for step in self.lock.steps)
        with counted(count, progress, description) as done:
            self.lock.run(self._enough, done)
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

    def _enough(self, step: Step | None) -> bool:
        """Whether a layer has samples enough, or as many as fit into memory; at the end (None) only the latter."""
        if sum(batch.images for batch in self.lock.seen) < self.options.least_images:
            return False
        more = self.lock.held() * (1 + 1 / self.lock.active)  # with another batch
        return more > self.options.memory or (step is not None and self._samples(step) >= self.options.samples)

    def _samples(self, step: Step) -> int:
        assert step.samples is not None
        return sum(step.samples(batch.env[0][step.node.name]) for batch in self.lock.seen)

    def _solve_unit(self, unit: Unit) -> None:
        inner = {pair: self.fits.pop(pair.inner) for pair in self.inner.get(unit, ())}
        found = self.fitter.solve(unit, inner, self.options.rounds)
        count = unit.layers[0].contraction.samples
        samples = sum(count(batch.env[0][unit.root.name]) for batch in self.lock.seen)
        if samples < width(unit):
            self.few[unit.layers[0].weight.removesuffix(".weight")] = samples, width(unit)
        if any(unit is pair.inner for pairs in self.inner.values() for pair in pairs):
            self.fits[unit] = found
        self.solved += len(unit.layers)

    def _solve_norm(self, norm: Norm) -> None:
        name, seen = norm.node.name, self.lock.seen
        goals = [self.target(name, [env[name] for env in batch.env[:-1]]) for batch in seen]
        values = norm.fit(self.merged, [batch.env[-1][name] for batch in seen], goals)
        for batch, value in zip(seen, values, strict=True):
            batch.env[-1][name] = value
        self.lock.streams[-1].reload()
