"""Heads: each model's own rest behind the cut, from what the trunk gives.

A model's channels are found again in what crosses the cut by U. U is folded into the next linear layers where nothing
stands between, and is else a gather of channels (or a product, where U mixes channels) that is inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.loops import device_of
from fxzip.graphs import attribute, free_name, linear_of, parameter_uses
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.split.along import along_axes
from fxzip.passes.split.fuse import Mixing, mixed_along
from fxzip.passes.split.laid import Laid, Move, moved_along
from fxzip.passes.split.parts import part
from fxzip.rules import Linear, kind_of, target_of
from fxzip.rules.sizing import find_size_rule


def head(plan: MergePlan, model: int) -> fx.GraphModule:
    """The head of one model: it takes what crosses the cut, merged, and gives what the model gives."""
    module = plan.alignment.modules[model]
    before, own = plan.places(model), plan.learned(model)
    after = [node for node in module.graph.nodes if node.name not in before or node.name in own]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    folds: list[Fold] = []
    gathers: dict[str, Tensor] = {}
    sources = [(plan.name(i), plan.node(i, model), i) for i in plan.crossing]
    for _, source, _ in sources:
        copies[source] = graph.placeholder(source.name)
    for name, source, i in sources:
        unmerge = Unmerge.of(plan, name, model)
        found = foldable(plan, i, model) if unmerge.moves else []
        if found is None:
            copies[source] = unmerge.insert(graph, copies[source], gathers)
        else:
            folds += found
    for node in after:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    result = part(module, graph, "Head", _placed(gathers, module))
    for fold in folds:
        fold.apply(result)
    return result


def _placed(gathers: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Indices and matrices where the model's tensors are, and matrices in their dtype."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    device = device_of(module)
    return {n: how.to(device, dtype if how.is_floating_point() else how.dtype) for n, how in gathers.items()}


@dataclass(frozen=True, eq=False)
class Unmerge:
    """How one model's channels are found in a merged tensor, for each axis that has channels.

    Attributes:
        node: The tensor's node in the first model.
        steps: (axis, how) pairs; ``how`` is the merged position of each of the model's positions, int64 of shape
            (positions,), or where one position is found from several, U itself, (positions, merged positions).
        resized: Whether there are other numbers of merged channels than the model's.
    """

    node: str
    steps: tuple[tuple[int, Tensor], ...]
    resized: bool = False

    @classmethod
    def of(cls, plan: MergePlan, node: str, model: int) -> Unmerge:
        """From the maps of the spaces that the tensor holds."""
        steps = along_axes(plan.spec, plan.maps, node, model, "contract", trunk=plan.trunk_spec).items()
        resized = any(len(matrix) != matrix.shape[1] for _, matrix in steps)
        return cls(node, tuple((axis, _as_gather(matrix)) for axis, matrix in steps), resized)

    @property
    def moves(self) -> bool:
        """Whether any channel is elsewhere than it was."""
        moved = (how.dim() == 2 or not torch.equal(how, torch.arange(len(how))) for _, how in self.steps)
        return self.resized or any(moved)

    def insert(self, graph: fx.Graph, node: fx.Node, buffers: dict[str, Tensor]) -> fx.Node:
        """Append the steps to a graph; indices and matrices are added to ``buffers`` under new names."""
        for axis, how in self.steps:
            name = f"unmerge_{self.node}" if len(self.steps) == 1 else f"unmerge_{self.node}_{axis}"
            name = free_name(name, buffers)  # a node may be called as another one and an axis
            buffers[name] = how

            # Names of its own: nodes of a head that have the model's names are known as the model's.
            def call(function: Any, *args: Any, called: str = name) -> fx.Node:
                return graph.create_node("call_function", function, args, name=called)

            buffer = graph.get_attr(name)
            if how.dim() == 1:
                node = call(torch.index_select, node, axis, buffer, called=f"{name}_gather")
            else:
                last = call(torch.movedim, node, axis, -1, called=f"{name}_last")
                mixed = call(F.linear, last, buffer, called=f"{name}_linear")
                node = call(torch.movedim, mixed, -1, axis, called=f"{name}_mix")
        return node


def _as_gather(matrix: Tensor) -> Tensor:
    """The position of the only 1 in each row, or the matrix where rows are anything else."""
    place = matrix.argmax(1)
    return place if torch.equal(matrix, F.one_hot(place, matrix.shape[1]).to(matrix)) else matrix


@dataclass(frozen=True, eq=False)
class Fold:
    """U folded into the columns of a linear layer or convolution: W U; ``into``: where there is another number then."""

    parameter: str
    axis: int
    index: Tensor
    mixing: Mixing
    into: Laid | None = None

    def apply(self, head: fx.GraphModule) -> None:
        """Change the head's weight."""
        weight = head.get_parameter(self.parameter)
        with torch.no_grad():
            work = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.into is None:
                weight.copy_(mixed_along(work, (self.axis,), self.index.to(weight.device), self.mixing))
                return
            found = moved_along(work, (self.axis,), [Move(self.index, self.mixing, self.into)]).to(weight)
        owner, _, leaf = self.parameter.rpartition(".")
        module = head.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(found.contiguous(), requires_grad=weight.requires_grad))
        for name in ("in_channels", "in_features"):  # of a layer without groups
            if hasattr(module, name):
                setattr(module, name, found.shape[self.axis])


def foldable(plan: MergePlan, i: int, model: int) -> list[Fold] | None:
    """The folds that undo the merge of the i-th shared node, which crosses; None where something else uses it.

    Between the cut and the linear layers only operations that act on each channel alone may stand, and none
    where U mixes channels: what it undoes must be undone before anything that is not linear.
    """
    module, spec = plan.alignment.modules[model], plan.spec
    first = {names[model]: names[0] for names in plan.alignment.shared}
    before, ours = plan.places(model), plan.learned(model)
    pending, folds = [plan.node(i, model)], list[Fold]()
    uses = parameter_uses(module, (n for n in module.graph.nodes if n.name not in before or n.name in ours))
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.name in before:
                continue
            linear = linear_of(module, user)
            if linear is not None and linear.input is node and uses[id(attribute(module, linear.weight))] == 1:
                found = _folds(plan, first[node.name], linear, model)
                if found is None:
                    return None
                folds += found
            elif (
                user.name in first
                and not _mixes(plan, first[node.name])
                and user.op != "output"
                and kind_of(target_of(module, user)) in ("passive", "pointwise")
                and (plan.resized is None or find_size_rule(target_of(module, user)) is None)
                and (len(user.all_input_nodes) == 1 and _same_spaces(spec, first[node.name], first[user.name]))
            ):
                pending.append(user)
            else:
                return None
    return folds


def _mixes(plan: MergePlan, node: str) -> bool:
    """Whether some channel of a node is found from several merged ones."""
    return any(s.name in plan.maps and plan.maps[s.name].sparse is None for s, _, _ in plan.spec.locate(node))


def _same_spaces(spec: ChannelSpec, left: str, right: str) -> bool:
    return {s.name for s, _, _ in spec.locate(left)} == {s.name for s, _, _ in spec.locate(right)}


def _folds(plan: MergePlan, node: str, linear: Linear, model: int) -> list[Fold] | None:
    found = []
    rank = plan.spec.layout.factors[node][0].dim()
    whole = along_axes(plan.spec, plan.maps, node, model, "contract", trunk=plan.trunk_spec) if plan.resized else {}
    for space, axes, index in plan.spec.locate(node):
        axis = linear.contraction.mixed.get(axes[0] - rank) if len(axes) == 1 else None
        if space.size > 1 and axis is None:
            return None
        if axes[0] in whole and axis is not None:
            matrix = whole.pop(axes[0])
            every = torch.arange(matrix.shape[1])[:, None]
            laid = Laid(every, (len(every),))
            found.append(
                Fold(linear.weight, axis, torch.arange(len(matrix))[:, None], Mixing(len(every), matrix.T), laid)
            )
        elif space.name in plan.maps and space.size > 1 and axis is not None and plan.resized is None:
            mixing = Mixing.of(plan.maps[space.name], model, "contract")
            found.append(Fold(linear.weight, axis, index, mixing))
    return found
