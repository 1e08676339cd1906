"""Merged networks among the models of a merge: each of their tasks is a model, so that further ones can join."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from fxzip.errors import OptionError
from fxzip.graphs import attribute, free_name, placeholders
from fxzip.merged import ZippedModel

_TASK = "fxzip_task"
"""Key in the meta of the network of one task of a merged one: its name."""


def separated(models: Sequence[Any], names: Iterable[str] | None) -> tuple[list[Any], list[str] | None]:
    """The models, with one for each task in the place of a merged network, and the names of all.

    Args:
        models: What a user gave.
        names: The tasks' names, if he gave some.

    Returns:
        The models; and the names, None where nobody has given any. A merged network's tasks keep theirs.

    Raises:
        OptionError: Two merged networks have a task of the same name, and no names are given.
    """
    found: list[Any] = []
    for model in models:
        found += [_of_task(model, task) for task in model.names] if isinstance(model, ZippedModel) else [model]
    if names is not None or not any(map(is_task, found)):
        return found, names if names is None else [names] if isinstance(names, str) else list(names)
    known = [task_of(model) for model in found if is_task(model)]
    if len(set(known)) < len(known):
        raise OptionError(f"the merged networks have tasks of the same name ({', '.join(known)}): give names=...")
    taken = set(known)
    chosen = []
    for place, model in enumerate(found):
        name = task_of(model) if is_task(model) else free_name(f"task{place}", taken)
        taken.add(name)
        chosen.append(name)
    return found, chosen


def is_task(model: object) -> bool:
    """Whether a model is one task of a merged network."""
    return isinstance(model, fx.GraphModule) and _TASK in model.meta


def task_of(model: fx.GraphModule) -> str:
    """Which task it is."""
    return str(model.meta[_TASK])


def _of_task(zipped: ZippedModel, task: str) -> nn.Module:
    """The trunk and one head as one network, which shares their tensors."""
    graph = fx.Graph()
    inputs = [graph.placeholder(str(node.target), default_value=node.args[0]) if node.args
              else graph.placeholder(str(node.target)) for node in placeholders(zipped.trunk)]  # fmt: skip
    crossing = graph.call_module("trunk", tuple(inputs))
    head = zipped.head(task)
    count = len(placeholders(head))
    given = tuple(graph.call_function(operator.getitem, (crossing, place)) for place in range(count))
    graph.output(graph.call_module("head", given))
    network = fx.GraphModule({"trunk": zipped.trunk, "head": head}, graph, class_name="Task")
    network.meta[_TASK] = task
    return network.train(zipped.training)


def inner_names(module: fx.GraphModule) -> fx.GraphModule:
    """The traced network of a task with its layers under the names that they had before they were merged.

    A head's layer whose name the trunk has taken stays ``head.NAME``.
    """
    targets: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target) not in targets:
            inner = str(node.target).removeprefix("trunk.").removeprefix("head.")
            taken = any(inner == name or f"{inner}.".startswith(f"{name}.") for name in targets.values())
            targets[str(node.target)] = str(node.target) if taken else inner
    passing = {name for part, p in module.named_modules() for name in _full(part, p._non_persistent_buffers_set)}
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = targets[str(node.target)]
            steps = str(node.target).split(".")
            paths = [".".join(steps[:count]) for count in range(1, len(steps) + (node.op == "call_module"))]
            node.meta["nn_module_stack"] = {path: (path, nn.Module) for path in paths}
    attributes = {new: attribute(module, old) for old, new in targets.items()}
    named = fx.GraphModule(attributes, module.graph, class_name="Task").eval()
    for old in passing & targets.keys():
        owner, _, leaf = targets[old].rpartition(".")
        named.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    named.meta.update(module.meta)
    return named


def _full(part: str, names: Iterable[str]) -> list[str]:
    return [f"{part}.{name}" if part else name for name in names]
