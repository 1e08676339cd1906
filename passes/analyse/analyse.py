"""Analyse: find the channel spaces of a traced network by running its graph on labels.

1. Shapes at batch 1 are read off the trace, or propagated with fake tensors.
2. Each node's rule (`fxzip.rules`) turns the labels of its inputs into those of its output, and records which
   labels are one channel, which move as blocks and which must stay in place.
3. An operation without a rule, or with arguments that its rule does not cover, is probed (`fxzip.rules.probe`); what
   that does not explain is frozen.
4. The labels are partitioned into channel spaces (`fxzip.labelling.partition`).
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec, Layout
from fxzip.data.batches import with_batch_size
from fxzip.errors import FrozenSpaceWarning, RuleError
from fxzip.graphs import attribute, run_call
from fxzip.labelling.counting import with_reasons
from fxzip.labelling.folding import simplified
from fxzip.labelling.labels import LabelGraph, Labelled, in_place
from fxzip.labelling.partition import partition
from fxzip.passes.analyse.shapes import propagate_shapes
from fxzip.rules import RuleContext, Unsupported, find_entry, target_of
from fxzip.rules.movement import move, move_module
from fxzip.rules.probe import probe
from fxzip.rules.registry import as_labelled, mapped

_SIZES = {
    "size", "sym_size", "dim", "ndimension", "numel", "sym_numel", "nelement", "stride", "sym_stride", "getattr", "len",
    "is_floating_point", "is_complex", "get_device", "element_size", "storage_offset",
}  # fmt: skip
"""What is asked of a tensor without looking at its values."""


def analyse_graph(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ChannelSpec:
    """The channel spaces of a traced network.

    Args:
        module: The network; its outputs keep their channels in place.
        args: Positional inputs of a batch of any size.
        kwargs: Keyword inputs.

    Warns:
        FrozenSpaceWarning: An operation is not known; the warning names its node.
    """
    example = (args, dict(kwargs))
    shapes = propagate_shapes(module, *with_batch_size(*example, 1))
    flow = Flow(module, shapes)
    flow.run()
    spaces, frozen, layout = partition(flow.graph)
    spaces = with_reasons(flow.graph, spaces, layout)
    layout = replace(layout, factors=flow.factors(), bundles=flow.bundles())
    opposed = {node: tuple(axes) for node, axes in flow.graph.opposed.items() if axes}
    share = _coverage(module, flow.graph, layout)
    folded = tuple(module.meta.get("folded", ()))
    return ChannelSpec(spaces, frozen, share, layout, example, tuple(flow.probed), opposed, folded)


@dataclass(eq=False)
class Flow:
    """Runs a graph on labels.

    Attributes:
        module: The network.
        shapes: Each node's value, tensors without memory.
        graph: The labels found so far.
        values: Each node's value as the analysis sees it: `Labelled`, a real tensor for a constant, or a number.
        probed: What probing found, a sentence for each operation that was understood by it.
    """

    module: fx.GraphModule
    shapes: dict[str, Any]
    graph: LabelGraph = field(default_factory=LabelGraph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = self.module.state_dict(keep_vars=True)
        self._state = set(state)
        first: dict[int, str] = {}
        for name, tensor in state.items():
            self.graph.aliases[name] = first.setdefault(id(tensor), name)

    def run(self) -> None:
        """Visit every node in order."""
        for node in self.module.graph.nodes:
            if node.op == "output":
                self._freeze_outputs(node)
            else:
                self.values[node] = self._visit(node)

    def _visit(self, node: fx.Node) -> Any:
        out = self.shapes[node.name]
        if node.op == "placeholder":
            return _positional(out)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if not _holds_tensor(out):
            self._read(node)
            return out
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], Mapping | tuple | list):
            container: Any = args[0]
            return container[args[1]]  # a part of a nested input
        if node.op != "call_module" and not _any(args, kwargs, Labelled):
            return _constant(node, args, kwargs, out)
        return self._apply_rule(node, args, kwargs, out)

    def _read(self, node: fx.Node) -> None:
        """A number that is no size was read from a tensor: it is known by its place, and so are the channels there."""
        if str(getattr(node.target, "__name__", node.target)).split(".")[0] in _SIZES:
            return
        for source in node.all_input_nodes:
            ctx = RuleContext(self.graph, node, None)
            mapped(self.values[source], partial(ctx.freeze, why=f"{node.name} (a number that is read)"))

    def _attribute(self, name: str) -> Any:
        value = attribute(self.module, name)
        if isinstance(value, Tensor) and name in self._state and value.is_floating_point():
            return Labelled(tuple(value.shape), parameter=name)
        return value.detach() if isinstance(value, Tensor) else value

    def _apply_rule(self, node: fx.Node, args: Any, kwargs: Any, out: Any) -> Any:
        target = target_of(self.module, node)
        module = target if node.op == "call_module" else None
        ctx = RuleContext(self.graph, node, out, module)
        self.graph.node = node.name
        entry = find_entry(target)
        if entry is None:
            return self._probe(ctx, args, kwargs, "no rule for it")
        rule = entry.rule
        own = () if module is None else (module,)
        args, kwargs = mapped((args, kwargs), _operand)
        try:
            result = mapped(rule(ctx, *own, *args, **kwargs), self._simplified)
            result = result if entry.uniform else mapped(result, _in_place)
            # Where the values change, all channels must be treated alike; a move says so itself.
            return result if rule in (move, move_module) else mapped(result, ctx.changed)
        except Unsupported as error:
            return self._probe(ctx, args, kwargs, str(error))
        except Exception as error:
            if not _takes(rule, (ctx, *own, *args), kwargs):
                return self._probe(ctx, args, kwargs, "its rule does not take these arguments")
            if rule.__module__.split(".")[0] == "fxzip":
                raise RuleError(
                    f"{_title(ctx)}: fxzip's own rule {rule.__qualname__} failed, which is a bug in fxzip; please "
                    f"report it with this message: {error}"
                ) from error
            return self._freeze(ctx, args, kwargs, f"its rule failed: {error}")

    def _simplified(self, value: Any) -> Any:
        return simplified(self.graph, value) if isinstance(value, Labelled) else value

    def _probe(self, ctx: RuleContext, args: Any, kwargs: Any, why: str) -> Any:
        """Try what the operation does; keep in place what it touches where that tells nothing."""
        node = ctx.node
        fakes = fx.node.map_arg((node.args, node.kwargs), lambda n: self.shapes[n.name])
        try:
            result, found = probe(ctx, (args, kwargs), fakes)
        except Unsupported as error:
            return self._freeze(ctx, args, kwargs, f"{why}, {error}")
        result = mapped(mapped(result, _in_place), ctx.changed)
        self.probed.append(f"{_title(ctx)}: {found}")
        return result

    def _freeze(self, ctx: RuleContext, args: Any, kwargs: Any, why: str) -> Any:
        node = ctx.node
        reason = f"{_title(ctx)}: {why}"
        mapped((args, kwargs), lambda v: ctx.freeze(v, reason))
        if ctx.module is not None:
            for name, tensor in ctx.module.named_parameters():
                for axis in range(tensor.dim()):
                    known = self.graph.axes.get((f"{node.target}.{name}", axis))
                    if known is not None:
                        self.graph.freeze(known.labels, reason)
        warnings.warn(f"channels are kept in place at {reason}", FrozenSpaceWarning, stacklevel=6)
        return ctx.positional()

    def _freeze_outputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            mapped(self.values[source], lambda v: RuleContext(self.graph, node, None).freeze(v, "output"))

    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """The label tensors of each node with a single tensor as output."""
        return {n.name: v.factors for n, v in self.values.items() if isinstance(v, Labelled)}

    def bundles(self) -> frozenset[str]:
        """The nodes whose output is a collection of tensors with channels, or has channels and samples on one axis."""
        return frozenset(
            node.name
            for node, value in self.values.items()
            if (_among_samples(node, value) if isinstance(value, Labelled) else _any(value, {}, Labelled))
        )


def _among_samples(node: fx.Node, value: Labelled) -> bool:
    """Whether channels lie along an axis that samples lie along, too: attention heads that were folded into the batch.

    There are as many of them as samples times channels, so an index of the channels does not find them.
    """
    recorded = node.meta.get("val")
    if not isinstance(recorded, Tensor):
        return False
    grows = [axis for axis, size in enumerate(recorded.shape) if isinstance(size, torch.SymInt)]
    return any(factor.shape[axis] > 1 for factor in value.factors for axis in grows if axis < factor.dim())


def _takes(rule: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule can be called with these arguments."""
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _operand(value: Any) -> Any:
    """A constant among the operands as a labelled value; integers and masks are indices, and stay as they are."""
    return as_labelled(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _in_place(value: Any) -> Any:
    """What an operation gives that may treat constants of one value by where they stand."""
    return replace(value, factors=tuple(map(in_place, value.factors))) if isinstance(value, Labelled) else value


def _title(ctx: RuleContext) -> str:
    """A node and what it calls, to be shown."""
    target = ctx.node.target
    what = type(ctx.module).__name__ if ctx.module is not None else getattr(target, "__name__", target)
    return f"{ctx.name} ({what})"


def _positional(out: Any) -> Any:
    return mapped(out, lambda v: Labelled(tuple(v.shape)) if isinstance(v, Tensor) else v)


def _holds_tensor(value: Any) -> bool:
    return _any(value, {}, Tensor)


def _any(args: Any, kwargs: Any, kind: type) -> bool:
    found: list[object] = []
    mapped((args, kwargs), lambda v: found.append(v) if isinstance(v, kind) else None)
    return bool(found)


def _constant(node: fx.Node, args: Any, kwargs: Any, out: Any) -> Any:
    """What depends on no input and no parameter is computed; on the CPU, where its device holds no values."""
    on_meta = {torch.device("meta"): torch.device("cpu")}
    args, kwargs = mapped((args, kwargs), lambda v: on_meta.get(v, v) if isinstance(v, torch.device) else v)
    try:
        with torch.no_grad():
            return run_call(node.target, args, kwargs)
    except Exception:
        return _positional(out)


def _coverage(module: nn.Module, graph: LabelGraph, layout: Layout) -> float:
    """Share of the elements of all parameters that lie in a space along at least one axis."""
    total = covered = 0.0
    by_name: dict[str, list[float]] = {}
    inside = (layout.space >= 0).numpy()
    for (name, _), axis in graph.axes.items():
        by_name.setdefault(name, []).append(1 - float(inside[axis.labels.numpy()].mean()))
    for name, parameter in module.named_parameters():
        outside = 1.0
        for share in by_name.get(name, []):
            outside *= share
        total += parameter.numel()
        covered += parameter.numel() * (1 - outside)
    return covered / total if total else 1.0
