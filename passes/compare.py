"""The compare pass: how well a merged network answers as its parents do (`fxzip.fidelity`).

Parents and merged network run side by side on images that the fit did not see. Outputs are compared leaf by leaf; at
each merge point the parents' features are compared with what U finds again of them in the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxzip.channels import MergePoint
from fxzip.data.batches import Inputs, batch_size
from fxzip.differences import Errors, over_all
from fxzip.fidelity import Answer, Depth, Fidelity
from fxzip.graphs import bind_inputs, nodes_by_name
from fxzip.joint import NAME, Joint, class_axis
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.split import Split
from fxzip.passes.split.along import unmerged
from fxzip.passes.split.fuse import Mixing, mixed_along
from fxzip.processes import ALONE, Processes

_CLASS_OUTPUTS = frozenset({"['logits']", "['out']", "['aux']"})
"""Outputs that hold classes, by their names (transformers', torchvision's)."""


def compare(
    parts: Split,
    plan: MergePlan,
    names: Sequence[str],
    points: Mapping[str, Sequence[MergePoint]],
    held: Sequence[Inputs],
    fitted: int,
    processes: Processes = ALONE,
) -> Fidelity | None:
    """Measure trunk and heads beside the parents; None where nothing was held back.

    Args:
        parts: Trunk and heads.
        plan: What they were built from.
        names: The tasks.
        points: The merge points of each space.
        held: Batches of images that the fit did not see.
        fitted: How many images it saw.
        processes: Those that held back some images each.
    """
    (images,) = processes.numbers("images held back", sum(batch_size(*batch) for batch in held))
    if not images:
        return None
    running = _Comparison(parts, plan, points)
    with processes.together("comparing"), torch.no_grad():
        for args, kwargs in held:
            running.add(args, kwargs)
    running.outputs = over_all(processes, running.outputs)
    running.features = over_all(processes, running.features)
    answers = tuple(
        Answer(names[model], output, *found.figures())
        for (model, output), found in running.outputs.items()
        if found.varies
    )
    return Fidelity(int(images), fitted, answers, tuple(running.depths()))


def compare_joint(
    parts: Split, models: Sequence[fx.GraphModule], joint: Joint, held: Sequence[Inputs], found: Fidelity,
    processes: Processes = ALONE,
) -> Fidelity:  # fmt: skip
    """Measure the one head of a merge beside all parents together, their outputs joined in the same way.

    Args:
        parts: The trunk, and the head.
        models: The parents.
        joint: How outputs become one.
        held: Batches of images that the fit did not see.
        found: What `compare` found of the heads before they became one.
        processes: As for `compare`.
    """
    error: Errors | None = None
    with torch.no_grad():
        for args, kwargs in held:
            wanted = joint([model(*bind_inputs(model, args, kwargs).values()) for model in models])
            has = parts.heads[0](*parts.trunk(*bind_inputs(parts.trunk, args, kwargs).values()))
            error = error or Errors(_class_axis("", wanted, _of_tokens(args, kwargs)))
            error.add(wanted, has)
    error = over_all(processes, {} if error is None else {NAME: error}).get(NAME)
    answers = (Answer(NAME, "", *error.figures()),) if error is not None and error.varies else ()
    return replace(found, answers=answers)


class _Comparison:
    """Runs parents and merged network, and adds up their differences.

    Attributes:
        outputs: By model and name of the output.
        features: By node of the trunk, and model.
    """

    def __init__(self, parts: Split, plan: MergePlan, points: Mapping[str, Sequence[MergePoint]]) -> None:
        self.parts, self.plan = parts, plan
        self.outputs: dict[tuple[int, str], Errors] = {}
        there = nodes_by_name(parts.trunk)
        places = plan.places(0)
        wanted = [(point.node, space) for space, own in points.items() if space in plan.maps for point in own]
        wanted = [(node, space) for node, space in wanted if node in there and places.get(node, -1) >= plan.begin]
        self.points = sorted(dict.fromkeys(wanted), key=lambda point: places[point[0]])
        self.features = {(node, model): Errors() for node, _ in self.points for model in plan.models}

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add a batch."""
        nodes = {node for node, _ in self.points}
        crossing, merged = _run(self.parts.trunk, bind_inputs(self.parts.trunk, args, kwargs).values(), nodes)
        tokens = _of_tokens(args, kwargs)
        for model, module in enumerate(self.plan.alignment.modules):
            own = {self.plan.name(self.plan.places(0)[node], model): node for node in nodes}
            output, seen = _run(module, bind_inputs(module, args, kwargs).values(), own)
            self._add_outputs(model, output, self.parts.heads[model](*crossing), tokens)
            for name, value in seen.items():
                found = self._unmerged(own[name], merged[own[name]], model)
                self.features[own[name], model].add(value, found)

    def _add_outputs(self, model: int, wanted: Any, has: Any, tokens: bool) -> None:
        pairs = zip(_leaves(wanted).items(), _leaves(has).values(), strict=True)
        for (name, leaf), given in pairs:
            if (model, name) not in self.outputs:
                self.outputs[model, name] = Errors(_class_axis(name, leaf, tokens))
            self.outputs[model, name].add(leaf, given)

    def _unmerged(self, node: str, value: Tensor, model: int) -> Tensor:
        """What U finds again of a model's channels in a merged value."""
        if self.plan.resized is not None:
            return unmerged(self.plan, node, value, model)
        for space, axes, index in self.plan.spec.locate(node):
            found = self.plan.maps.get(space.name)
            if found is not None and axes:
                value = mixed_along(value, axes, index.to(value.device), Mixing.back(found, model))
        return value

    def depths(self) -> list[Depth]:
        """The merge points' shares, where the features vary."""
        found = []
        for node, space in self.points:
            errors = [self.features[node, model] for model in self.plan.models]
            if all(error.varies for error in errors):
                found.append(Depth(space, node, tuple(error.figures()[0] for error in errors)))
        return found


class _Watched(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(module)
        self.names = names
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value


def _run(module: fx.GraphModule, inputs: Any, names: Collection[str]) -> tuple[Any, dict[str, Any]]:
    """What a graph gives, and the values of some nodes on the way."""
    watched = _Watched(module, names)
    return watched.run(*inputs), watched.seen


def _of_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether inputs are whole numbers."""
    return not any(x.is_floating_point() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _leaves(output: Any) -> dict[str, Tensor]:
    """The tensors of floats in an output, by where they are; a single one has no name."""
    found: list[tuple[Any, Any]] = pytree.tree_flatten_with_path(output)[0]
    show: Callable[[Any], str] = pytree.keystr
    tensors = [(path, leaf) for path, leaf in found if isinstance(leaf, Tensor) and leaf.dim()]
    return {show(path): leaf for path, leaf in tensors if leaf.is_floating_point()}


def _class_axis(name: str, leaf: Tensor, tokens: bool) -> int | None:
    """The axis of an output's classes; None where it has none.

    A matrix is taken for logits, and so is what a network of integer tokens gives for each of them. Classes come last,
    but in front of the axes of a map.
    """
    known = leaf.dim() == 2 or name in _CLASS_OUTPUTS or (tokens and leaf.dim() == 3 and not name)
    axis = class_axis(leaf.dim())
    return axis if known and leaf.dim() > 1 and leaf.shape[axis] > 1 else None
