"""Refit: closed-form least squares of the merged weights, layer by layer, on the merged network's own inputs.

Parents and merged network run in lock step over the calibration images, node by node. At each layer

    W* = argmin Σ ‖T - W X - b‖² + λ ‖W - W₀‖²

with X the layer's input *in the merged network*, as the layers before were refitted, and T = M [z_1; ...; z_N] the
parents' values under the space's map: errors are corrected as they arise. BatchNorms and scales behind a layer are
folded into it. Where layers end in a sum (a residual add, a downsampling shortcut beside a convolution) they are
solved together, for the parents' sum minus what the merged network's skip carries. W₀ is the paper's rule, so what
the images do not determine stays as it was, and a merge that is exact already stays exact. Norms that stand alone
get the scale and shift that fit best (REPAIR, arXiv 2211.08403, in closed form). The layers of a head are refitted
to its own parent's values. No labels are used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.errors import CalibrationError, OptionError
from fxzip.loops import batches, device_of
from fxzip.matching import MergeMap
from fxzip.passes._units import Layer, Unit, find_units, inner_sums, is_norm, scale_and_shift_of
from fxzip.passes.align import Alignment
from fxzip.passes.fuse import Mixing, applied
from fxzip.passes.split import Split, crossing
from fxzip.regression import Regression, patches, scale_and_shift

Target = Callable[[str, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class RefitOptions:
    """How to refit.

    Attributes:
        ridge: λ as a share of the mean of the inputs' sums of squares; 0 or more.
        images: Most images to use.
        samples: Positions that a layer is fitted on, at the least, if there are as many: layers with large feature
            maps take fewer images, so that memory is that of so many positions.
        seed: Of the draw of positions.
    """

    ridge: float = 1e-3
    images: int = 1024
    samples: int = 2**17
    least_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise OptionError(f"ridge={self.ridge}: it must be 0 or more")
        if self.images < 1:
            raise OptionError(f"images={self.images}: at least one image is needed")


def refit(
    parts: Split, alignment: Alignment, spec: ChannelSpec, maps: Mapping[str, MergeMap], cut: int,
    loader: Iterable[Any], options: RefitOptions | None = None, progress: bool = True,
) -> int:  # fmt: skip
    """Refit trunk and heads in place; returns how many layers were solved.

    The loader is read once. Memory is that of the inputs, of ``options.samples`` positions of the tensors that are
    alive at one node in all networks, and of the largest Gram matrix.

    Args:
        parts: What `fxzip.passes.split` built, by the paper's rule.
        alignment: The parents.
        spec: The channel spaces.
        maps: The merge maps.
        cut: The place of the cut.
        loader: The calibration images.
        options: See `RefitOptions`.
        progress: Show a bar.
    """
    options = options or RefitOptions()
    inputs = _read(loader, parts, options, progress)
    cross = crossing(alignment, cut)
    streams = [
        _Stream(module, {names[0]: names[model] for names in alignment.shared[:cut]})
        for model, module in enumerate(alignment.modules)
    ]
    streams.append(_Stream(parts.trunk, {}))
    feeds = [[_feed(parts.trunk, args, kwargs)] * len(streams) for args, kwargs in inputs]
    names = [alignment.shared[i][0] for i in cross]
    trunk = _LockStep(streams, feeds, lambda n, values: merge_values(spec, maps, n, values), options, set(names))
    trunk.run()
    solved = trunk.solved
    for model, head in enumerate(parts.heads):
        own = [alignment.shared[i][model] for i in cross]
        feeds = [
            [{mine: env[name] for name, mine in zip(names, own, strict=True)} for env in (b.env[model], b.env[-1])]
            for b in trunk.batches
        ]
        pair = [_Stream(alignment.modules[model], {}), _Stream(head, {})]
        run = _LockStep(pair, feeds, lambda _, values: values[0], options, set())
        run.run()
        solved += run.solved
    return solved


def merge_values(spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, values: Sequence[Tensor]) -> Tensor:
    """M [z_1; ...; z_N] for a node's output; channels that lie in no space are averaged."""
    total = torch.zeros_like(values[0])
    places = [(space, axes, index) for space, axes, index in spec.locate(node) if space.name in maps]
    for model, value in enumerate(values):
        share = torch.full((1,) * value.dim(), 1 / len(values), dtype=value.dtype, device=value.device)
        for space, axes, index in places:
            (axis,) = axes
            index = index.to(value.device)
            shape = [1] * value.dim()
            shape[axis] = value.shape[axis]
            full = share.expand(torch.broadcast_shapes(share.shape, shape)).clone()
            share = full.index_fill(axis, index.reshape(-1), 1.0)
            value = applied(value, axis, index, Mixing.of(maps[space.name], model, "produce"))
        total += value * share
    return total


def _read(loader: Iterable[Any], parts: Split, options: RefitOptions, progress: bool) -> list[Any]:
    """The calibration batches, up to the number of images that are wanted."""
    found, count = [], 0
    with batches(loader, device=device_of(parts.trunk) or device_of(parts.heads[0]), progress=False) as given:
        for args, kwargs in given:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            found.append((args, kwargs))
            count += len(tensors[0])
            if count >= options.images:
                break
    if not found:
        raise CalibrationError("the loader is empty: it gave no batch")
    return found


def _feed(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    nodes = module.graph.find_nodes(op="placeholder")
    values = dict(zip((n.name for n in nodes), args, strict=False))
    for node in nodes[len(args) :]:
        values[node.name] = kwargs.get(str(node.target), node.args[0] if node.args else None)
    return values


@dataclass(eq=False)
class _Stream:
    """One network of the lock step; ``names`` maps the merged graph's node names to this one's."""

    module: fx.GraphModule
    names: Mapping[str, str]
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    interpreter: fx.Interpreter | None = None

    def __post_init__(self) -> None:
        self.back = {own: name for name, own in self.names.items()}
        self.reload()

    def reload(self) -> None:
        """See the graph as it is now."""
        self.nodes = {node.name: node for node in self.module.graph.nodes}
        self.interpreter = fx.Interpreter(self.module, garbage_collect_values=False)

    def compute(self, name: str, env: dict[str, Any]) -> Any:
        """The value of a node, its inputs being in ``env`` under the merged graph's names."""
        node = self.nodes[self.names.get(name, name)]
        interpreter = self.interpreter
        assert interpreter is not None

        def value(n: fx.Node) -> Any:
            return interpreter.get_attr(n.target, (), {}) if n.op == "get_attr" else env[self.back.get(n.name, n.name)]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return getattr(interpreter, node.op)(node.target, args, kwargs)

    def reads(self, name: str) -> list[str]:
        """The merged graph's names of what a node is computed from; none if this network lacks the node."""
        node = self.nodes.get(self.names.get(name, name))
        return [self.back.get(n.name, n.name) for n in node.all_input_nodes] if node is not None else []

    def has(self, name: str) -> bool:
        """Whether this network has the node (gathers are the merged one's alone)."""
        return self.names.get(name, name) in self.nodes


@dataclass(eq=False)
class _Batch:
    """One batch's values in every stream, by the merged graph's node names; None until it is taken in."""

    feed: list[dict[str, Any]]
    env: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Step:
    """Compute a node in some streams (then forget what is used up), or solve a unit or a norm."""

    node: fx.Node
    streams: slice = field(default_factory=lambda: slice(None))
    unit: Unit | None = None
    norm: bool = False
    forget: tuple[str, ...] = ()


class _LockStep:
    """Runs the parents and the merged network side by side and solves the merged one's layers on the way."""

    def __init__(
        self,
        streams: list[_Stream],
        feeds: list[list[dict[str, Any]]],
        target: Target,
        options: RefitOptions,
        keep: set[str],
    ) -> None:
        self.streams, self.target, self.options, self.keep = streams, target, options, keep
        self.merged = streams[-1].module
        self.batches = [_Batch(feed) for feed in feeds]
        self.active = 0
        self.solved = 0
        self.generator = torch.Generator().manual_seed(options.seed)
        self.units = find_units(self.merged)
        self.steps = self._forgetting(self._schedule())

    def run(self) -> None:
        """Take every step; all batches have arrived at the end."""
        with torch.no_grad():
            self._take_in(1, 0)
            for number, step in enumerate(self.steps):
                if step.unit is not None or step.norm:
                    self._enough(step, number)
                    self._solve(step)
                else:
                    for batch in self.batches[: self.active]:
                        self._compute(step, batch)
            self._take_in(len(self.batches) - self.active, len(self.steps))
        for unit in self.units:
            _cut_out(self.merged, unit)
        self.merged.graph.eliminate_dead_code()
        self.merged.delete_all_unused_submodules()
        self.merged.recompile()

    def _schedule(self) -> list[_Step]:
        """The nodes in order, those of a unit's layers held back in the merged network until it is solved."""
        roots: dict[fx.Node, Unit | None] = {unit.root: unit for unit in self.units}
        claimed: dict[fx.Node, Unit] = {n: each for each in self.units for n in each.claimed}
        for each in self.units:
            claimed |= dict.fromkeys(inner_sums(each.root), each)
        parents, merged = slice(0, -1), slice(-1, None)
        steps = []
        for node in self.merged.graph.nodes:
            if node.op == "output":
                continue
            unit = roots.get(node)
            if unit is None and node not in claimed:
                steps.append(_Step(node))
                if is_norm(self.merged, node):
                    steps.append(_Step(node, norm=True))
                continue
            steps.append(_Step(node, parents))
            if unit is not None:
                steps.append(_Step(node, unit=unit))
                held = unit.claimed | inner_sums(unit.root) | {unit.root}
                steps += [_Step(n, merged) for n in self.merged.graph.nodes if n in held]
        return steps

    def _forgetting(self, steps: list[_Step]) -> list[_Step]:
        last: dict[str, int] = {}
        for number, step in enumerate(steps):
            reads = [name for stream in self.streams for name in stream.reads(step.node.name)]
            known = [n.name for n in step.unit.known] if step.unit is not None else []
            for name in (step.node.name, *reads, *known):
                last[name] = number
        done: dict[int, list[str]] = {}
        for name, number in last.items():
            if name not in self.keep:
                done.setdefault(number, []).append(name)
        return [_Step(s.node, s.streams, s.unit, s.norm, tuple(done.get(number, ()))) for number, s in enumerate(steps)]

    def _take_in(self, count: int, upto: int) -> None:
        """Bring further batches to where the others are."""
        for batch in self.batches[self.active : self.active + count]:
            batch.env = [dict(values) for values in batch.feed]
            for step in self.steps[:upto]:
                if step.unit is None and not step.norm:
                    self._compute(step, batch)
                else:
                    self._forget(step, batch)
            self.active += 1

    def _compute(self, step: _Step, batch: _Batch) -> None:
        for stream, env in list(zip(self.streams, batch.env, strict=True))[step.streams]:
            if step.node.op not in ("placeholder", "get_attr") and stream.has(step.node.name):
                env[step.node.name] = stream.compute(step.node.name, env)
        self._forget(step, batch)

    def _forget(self, step: _Step, batch: _Batch) -> None:
        for env in batch.env:
            for name in step.forget:
                env.pop(name, None)

    def _enough(self, step: _Step, number: int) -> None:
        """Take in batches until the layer has samples enough."""
        while self.active < len(self.batches):
            seen = self.batches[: self.active]
            values = [b.env[0][step.node.name] for b in seen]
            axis = 1 if step.unit is None or step.unit.layers[0].geometry is not None else -1
            samples = sum(v.numel() // v.shape[axis] for v in values)
            if samples >= self.options.samples and sum(len(v) for v in values) >= self.options.least_images:
                return
            self._take_in(1, number)

    def _solve(self, step: _Step) -> None:
        if step.unit is not None:
            self._solve_unit(step.unit)
        else:
            self._solve_norm(step.node)
        for batch in self.batches[: self.active]:
            self._forget(step, batch)

    def _goal(self, batch: _Batch, node: fx.Node) -> Tensor:
        return self.target(node.name, [env[node.name] for env in batch.env[:-1]])

    def _solve_unit(self, unit: Unit) -> None:
        sums = Regression()
        for batch in self.batches[: self.active]:
            goal = self._goal(batch, unit.root)
            for node in unit.known:
                goal = goal - batch.env[-1][node.name]
            inputs = [_columns(self.merged, layer, batch.env[-1][layer.source.name]) for layer in unit.layers]
            x, t = torch.cat(inputs, 1), _rows(unit.layers[0], goal)
            sums.add(*self._drawn(x, t))
        priors = [_folded(self.merged, layer) for layer in unit.layers]
        groups = unit.layers[0].groups
        flat = torch.cat([w.reshape(groups, w.shape[0] // groups, -1) for w in priors], 2)
        try:
            weights, bias = sums.solve(flat, self.options.ridge)
        except ArithmeticError as error:
            raise CalibrationError(f"refit at {unit.root.name}: {error}") from error
        self._write(unit, priors, weights, bias)
        self.solved += len(unit.layers)

    def _drawn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """At most this batch's share of the samples, drawn at random."""
        share = -(-2 * self.options.samples // self.active)
        if x.shape[2] <= share:
            return x, t
        here = torch.randperm(x.shape[2], generator=self.generator)[:share].to(x.device)
        return x[:, :, here], t[:, :, here]

    def _write(self, unit: Unit, priors: list[Tensor], weights: Tensor, bias: Tensor) -> None:
        start = 0
        for layer, prior in zip(unit.layers, priors, strict=True):
            width = prior[0].numel()
            part = weights[:, :, start : start + width].reshape(prior.shape)
            start += width
            shift = bias.reshape(-1) if layer is unit.layers[0] else torch.zeros_like(bias).reshape(-1)
            _set_layer(self.merged, layer, part, shift)
        self.streams[-1].reload()

    def _solve_norm(self, node: fx.Node) -> None:
        module = self.merged.get_submodule(str(node.target))
        axis = -1 if isinstance(module, nn.LayerNorm) else 1
        values = [(b.env[-1][node.name], self._goal(b, node)) for b in self.batches[: self.active]]
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return
        slope, shift = scale_and_shift(torch.cat([x for x, _ in values]), torch.cat([t for _, t in values]), axis)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        weight.mul_(slope.to(weight))
        if isinstance(bias, Tensor):
            bias.copy_(bias * slope.to(bias) + shift.to(bias))
        for batch, (value, _) in zip(self.batches, values, strict=False):
            shape = [1] * value.dim()
            shape[axis] = -1
            batch.env[-1][node.name] = value * slope.to(value).reshape(shape) + shift.to(value).reshape(shape)


def _columns(module: fx.GraphModule, layer: Layer, x: Tensor) -> Tensor:
    """A layer's inputs (groups, d, samples)."""
    if layer.geometry is None:
        return x.reshape(-1, x.shape[-1]).T[None]
    weight = attribute_named(module, layer.weight)
    stride, padding, dilation = layer.geometry
    return patches(x, (weight.shape[2], weight.shape[3]), stride, padding, dilation, layer.groups)


def _rows(layer: Layer, goal: Tensor) -> Tensor:
    """A layer's targets (groups, o, samples)."""
    if layer.geometry is None:
        return goal.reshape(-1, goal.shape[-1]).T[None]
    n, channels = goal.shape[:2]
    return goal.reshape(n, layer.groups, channels // layer.groups, -1).permute(1, 2, 0, 3).flatten(2)


def attribute_named(module: nn.Module, name: str) -> Tensor:
    """A parameter by its qualified name."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _folded(module: fx.GraphModule, layer: Layer) -> Tensor:
    """A layer's weight with the scales of its chain folded in, float64."""
    weight = attribute_named(module, layer.weight).detach().double()
    for node in layer.chain:
        line = scale_and_shift_of(module, node)
        assert line is not None
        weight = weight * line[0].double().reshape([-1] + [1] * (weight.dim() - 1))
    return weight


def _set_layer(module: fx.GraphModule, layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Write a layer's weight and bias; what its chain does becomes the identity until it is cut out."""
    old = attribute_named(module, layer.weight)
    old.copy_(weight.to(old.dtype))
    shift = nn.Parameter(bias.to(old.device, old.dtype), requires_grad=False)
    if layer.node.op == "call_module":
        module.get_submodule(str(layer.node.target)).bias = shift
    else:
        name = f"{layer.node.name}_bias"
        module.register_parameter(name, shift)
        with module.graph.inserting_before(layer.node):
            node = module.graph.get_attr(name)
        given = dict(layer.node.kwargs)
        args = list(layer.node.args)
        if len(args) > 2:
            args[2] = node
        else:
            given["bias"] = node
        layer.node.args, layer.node.kwargs = tuple(args), given
    for node in layer.chain:
        _make_identity(module, node)


def _make_identity(module: fx.GraphModule, node: fx.Node) -> None:
    """Let a folded node hand on its input; the graph keeps its nodes until all units are solved."""
    if node.op == "call_module":
        module.set_submodule(str(node.target), nn.Identity())
    else:
        node.target, node.args, node.kwargs = operator.pos, (node.args[0],), {}


def _cut_out(module: fx.GraphModule, unit: Unit) -> None:
    """Erase the nodes that were folded."""
    for layer in unit.layers:
        for node in layer.chain:
            node.replace_all_uses_with(layer.node)
        for node in reversed(layer.chain):
            module.graph.erase_node(node)


__all__ = ["RefitOptions", "merge_values", "refit"]
