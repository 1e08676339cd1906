"""The observe pass: moments of all models' channels, gathered in one lock-step run of all models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.channels import MergePoint
from fxzip.data.bars import Shown
from fxzip.data.held import HeldBack
from fxzip.data.loops import describe, evaluating, feed
from fxzip.errors import CalibrationError
from fxzip.graphs import drop_dead_code, nodes_by_name, placeholders, writes_in_place
from fxzip.journal import NONE, Journal, Watch
from fxzip.moments import Moments
from fxzip.observer import Observer
from fxzip.passes.align import Alignment
from fxzip.passes.reuse import reuse_memory
from fxzip.processes import ALONE, BUCKET, Processes, runs


def observe(
    alignment: Alignment,
    points: Mapping[str, Sequence[MergePoint]],
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Shown = True,
    max_batches: int | None = None,
    held: HeldBack | None = None,
    processes: Processes = ALONE,
    journal: Journal = NONE,
    stats_device: torch.device | None = None,
) -> dict[str, Moments]:
    """The moments of each space over a loader: each model sees every batch, in eval mode, without gradients.

    Memory is that of one batch through all models at once, activations being freed as the graph runs, plus
    float64 sums of (Σn)² for each space: it does not grow with the number of batches. The models are left as
    they were.

    Args:
        alignment: The models and the nodes that they share.
        points: The merge points of each space; several points of one space are pooled.
        loader: Gives tensors, tuples or lists whose first element is the input, or dicts of keyword inputs.
        device: Where inputs go; None: to where the models are.
        progress: Show a bar.
        max_batches: Stop after so many batches.
        held: Holds back some images: they run through the models, too, but are not counted.
        processes: Those that read a share of the images each; the moments are of all of them.
        journal: Keeps sums on the way, and has those of a run that was interrupted.
        stats_device: Where the moments are; None: where the activations are.

    Raises:
        CalibrationError: the loader is empty, a batch is of a wrong type or shape (the message has the shape
            given and the one expected), activations are not finite (the message names the node), or a model is
            on the meta device.
    """
    for number, module in enumerate(alignment.modules):
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise CalibrationError(
                f"model {number} is on the meta device and has no weights: load them first, by "
                "model.to_empty(device='cpu') and load_state_dict"
            )
    joint = insert_observers(alignment, points, stats_device)
    checked = _Checked(joint, alignment.modules[0], held, journal)
    shown: Any = {"progress": progress if processes.leads else False, "description": "observing"}
    with processes.together("observing"), evaluating(checked):
        least = 1 if processes.count == 1 else 0
        feed(checked, loader, device=device, max_batches=max_batches, least=least, **shown)
    observers = {module.name: module for module in joint.modules() if isinstance(module, Observer)}
    return _over_all(processes, {name: observers[name].take() for name in points})


def _over_all(processes: Processes, own: dict[str, Moments]) -> dict[str, Moments]:
    """The moments of the samples of all processes together (Chan, Golub and LeVeque, 1979), in two rounds of sums.

    Raises:
        CalibrationError: None of them had an image.
    """
    if processes.count == 1:
        return own
    sums = [torch.cat([seen.mean * seen.count, seen.mean.new_tensor([seen.count])]) for seen in own.values()]
    totals = dict(zip(own, processes.total("means", sums), strict=True))
    if not any(float(total[-1]) for total in totals.values()):
        raise CalibrationError("the loader gave no batches (is it a generator that was used up before?)")
    found: dict[str, Moments] = {}
    for names in runs(own, lambda name: len(own[name].mean) ** 2, BUCKET):
        means = {name: totals[name][:-1] / totals[name][-1].clamp(min=1) for name in names}
        for name in names:
            gap = own[name].mean - means[name]
            own[name].scatter.addr_(gap, gap, alpha=own[name].count)
        scatters = processes.total("moments", [own.pop(name).scatter for name in names])
        for name, scatter in zip(names, scatters, strict=True):
            found[name] = Moments(round(float(totals[name][-1])), means[name], scatter)
    return found


def insert_observers(
    alignment: Alignment, points: Mapping[str, Sequence[MergePoint]], device: torch.device | None = None
) -> fx.GraphModule:
    """One graph that runs all models in lock step, with an `Observer` call after each merge point.

    The models' submodules are in it as ``model_0``, ``model_1`` ...: the same objects, no copies. It takes
    model 0's inputs, gives nothing, and ends with the last merge point. The observers are ``observer_0``,
    ``observer_1`` ... in the order of ``points``; their ``name`` is the space's. ``device`` is where they keep sums.

    Raises:
        ValueError: a merge point is at a node that the models do not share.
    """
    root = nn.Module()
    for number, module in enumerate(alignment.modules):
        root.add_module(f"model_{number}", module)
    calls: dict[str, list[tuple[str, int]]] = {}
    for number, (name, own) in enumerate(points.items()):
        root.add_module(f"observer_{number}", Observer(len(alignment.modules), *own, name=name, device=device))
        for place, point in enumerate(own):
            calls.setdefault(point.node, []).append((f"observer_{number}", place))
    joint = fx.GraphModule(root, _joint_graph(alignment, calls), class_name="Observed")
    drop_dead_code(joint)
    joint.graph.lint()
    reuse_memory(joint)
    return joint


def _joint_graph(alignment: Alignment, calls: Mapping[str, list[tuple[str, int]]]) -> fx.Graph:
    """The models' nodes interleaved, to the last in ``calls`` (node of model 0 -> observers and places)."""
    missing = calls.keys() - {names[0] for names in alignment.shared}
    if missing:
        raise ValueError(f"merge points at nodes that the models do not share: {', '.join(sorted(missing))}")
    graph = fx.Graph()
    copies = [_Copy(graph, module, f"model_{number}") for number, module in enumerate(alignment.modules)]
    _share_inputs(graph, copies)
    left = len(calls)
    for names in alignment.shared:
        if not left:
            break
        nodes = [copy.upto(name) for copy, name in zip(copies, names, strict=True)]
        # At once, before the next node, which may write to this one's memory (`reuse_memory`).
        for observer, place in calls.get(names[0], ()):
            graph.call_module(observer, (place, *nodes))
        left -= names[0] in calls
    graph.output(None)
    return graph


class _Copy:
    """One model's nodes on their way into the joint graph, in the model's own order."""

    def __init__(self, graph: fx.Graph, module: fx.GraphModule, prefix: str) -> None:
        self.graph, self.module, self.prefix = graph, module, prefix
        self.env: dict[fx.Node, fx.Node] = {}
        self.by_name = nodes_by_name(module)
        self.inputs = placeholders(module)
        self.rest: Iterator[fx.Node] = iter(module.graph.nodes)

    def upto(self, name: str) -> fx.Node:
        """Copy all that is not there yet, up to and with the node of that name; the copy of that node."""
        wanted = self.by_name[name]
        while wanted not in self.env:
            node = next(self.rest)
            if node not in self.env:
                self.env[node] = self._copy(node)
        return self.env[wanted]

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, lambda used: self.env[used])
        if node.op in ("call_module", "get_attr"):
            copied.target = f"{self.prefix}.{node.target}"
        return copied


def _share_inputs(graph: fx.Graph, copies: Sequence[_Copy]) -> None:
    """Placeholders by position, named as model 0's. Where a model writes to one, each has its own clone.

    What `fxzip.passes.trace` gives writes to nothing; other graphs may.
    """
    for copy in copies:
        if len(copy.inputs) != len(copies[0].inputs):
            raise ValueError(f"the models take {len(copies[0].inputs)} and {len(copy.inputs)} inputs")
    shared = [graph.node_copy(node) for node in copies[0].inputs]
    for position, node in enumerate(shared):
        written = any(writes_in_place(user, copy.module) for copy in copies for user in copy.inputs[position].users)
        for copy in copies:
            copy.env[copy.inputs[position]] = graph.call_function(torch.clone, (node,)) if written else node


class _Checked(nn.Module):
    """The joint graph, refusing inputs that are of another rank than those that the models were traced with.

    A network without BatchNorm takes an image without its batch axis, and its channels are then somewhere
    else.
    """

    def __init__(self, joint: fx.GraphModule, module: fx.GraphModule, held: HeldBack | None, journal: Journal) -> None:
        super().__init__()
        self.joint, self.held = joint, held
        self.observers = [part for part in joint.modules() if isinstance(part, Observer)]
        self.watch = None if journal.folder is None else Watch(journal, self.observers)
        self.names = [str(node.target) for node in placeholders(module)]
        self.shapes = {str(node.target): _traced_shape(node) for node in placeholders(module)}

    def forward(self, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name, shape in self.shapes.items():
            value = given.get(name)
            if shape is not None and isinstance(value, Tensor) and value.ndim != len(shape):
                raise CalibrationError(
                    f"the models' input {name!r} has {len(shape)} axes, as in {list(shape)}; the loader gave "
                    f"{describe(args, kwargs)}"
                )
        rows = None if self.held is None else self.held.rest(args, kwargs)
        if self.watch is not None and self.watch.passes_over(args, kwargs):
            return
        for observer in self.observers:
            observer.rows = rows
        try:
            self.joint.forward(*args, **kwargs)  # not __call__, which prints the graph's code when it fails
        except CalibrationError:
            raise
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            expected = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items() if shape)
            hint = f" (they were traced with {expected})" if expected else ""
            raise CalibrationError(f"{describe(args, kwargs)} does not fit the models{hint}: {error}") from error
        if self.watch is not None:
            self.watch.observed()


def _traced_shape(node: fx.Node) -> tuple[int | str, ...] | None:
    """The shape of a placeholder's example value, where the trace kept one; only the batch is symbolic."""
    for key in ("val", "example_value", "tensor_meta"):
        shape = getattr(node.meta.get(key), "shape", None)
        if shape is not None:
            return tuple(size if isinstance(size, int) else "batch" for size in shape)
    return None
