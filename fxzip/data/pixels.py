"""Images in another scale than a network has learned on, told by the statistics of its first BatchNorm."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.data.batches import Inputs, to_device
from fxzip.data.loops import device_of
from fxzip.errors import PixelWarning
from fxzip.graphs import attribute, bind_inputs, named_call, norm_of

_FAR = 20.0
"""Deviations of the first activations, in those of training, from which (or below whose inverse) images are wrong."""
_BYTES = 60.0
"""From here on pixels of 0 to 255 stand where 0 to 1 was learned; these are some 255 times as large."""


def check_pixels(graphs: Sequence[fx.GraphModule], names: Sequence[str], example: Inputs) -> None:
    """Warn where a network's first activations are far larger, or smaller, than they were in training.

    Args:
        graphs: Traced networks, in eval mode.
        names: What they are called.
        example: Some images, or other inputs.
    """
    for name, graph in zip(names, graphs, strict=True):
        found = _compared(graph, example)
        if found is None or 1 / _FAR < found[1] < _FAR:
            continue
        norm, ratio = found
        what = "images of another scale than it was trained on"
        if ratio > _BYTES:
            what = "pixels of 0 to 255 where it was trained on 0 to 1: divide them by 255, and normalise as in training"
        if ratio < 1 / _BYTES:
            what = "pixels of 0 to 1 where it was trained on 0 to 255"
        warnings.warn(
            f"{name} seems to get {what} (its first activations, at {norm}, vary {ratio:.3g} times as much as its "
            "BatchNorm's statistics say)",
            PixelWarning,
            stacklevel=5,
        )


def _compared(graph: fx.GraphModule, example: Inputs) -> tuple[str, float] | None:
    """The name of the first BatchNorm, and how much its inputs vary, in multiples of its statistics.

    None where there is none, or it has learned nothing yet.
    """
    for node in graph.graph.nodes:
        norm, call = norm_of(graph, node), named_call(graph, node)
        source = None if call is None else call.source("input")
        if norm is None or call is None or source is None or not norm.statistics:
            continue
        mean, var = (call.parameter(key) for key in ("running_mean", "running_var"))
        if mean is None or var is None:
            return None
        owner = mean.rpartition(".")[0] or node.name
        return _ratio(graph, source, example, attribute(graph, mean), attribute(graph, var), owner)
    return None


def _ratio(
    graph: fx.GraphModule, source: fx.Node, example: Inputs, mean: Tensor, var: Tensor, owner: str
) -> tuple[str, float] | None:
    if mean.is_meta or (bool((mean == 0).all()) and bool((var == 1).all())):
        return None
    args, kwargs = to_device(*example, device_of(graph))
    try:
        with torch.no_grad():
            x = _Until(graph, source).run(*bind_inputs(graph, args, kwargs).values())
    except _Reached as reached:
        x = reached.value
    spread = x.double().transpose(0, 1).flatten(1)
    if spread.shape[1] < 2 or spread.shape[0] != len(var) or _is_flat(args):
        return None
    # What is too large is far from the mean of training, what is too small is near its own.
    far, near = mean.double().unsqueeze(1), spread.mean(1, keepdim=True)
    away, around = (_deviations(spread - middle, var) for middle in (far, near))
    return owner, away if away >= _FAR else around


def _deviations(x: Tensor, var: Tensor) -> float:
    """The root mean square of a middle channel, in deviations of training."""
    return float((x.square().mean(1) / var.double().clamp(min=1e-12)).median().sqrt())


def _is_flat(args: Sequence[Any]) -> bool:
    """Whether the images show nothing."""
    leaves = [leaf.double() for leaf in args if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(float(leaf.std()) <= 1e-3 * float(leaf.abs().max()) for leaf in leaves)


class _Reached(Exception):
    """The value of a node."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _Until(fx.Interpreter):
    """Runs a graph up to a node."""

    def __init__(self, graph: fx.GraphModule, last: fx.Node) -> None:
        super().__init__(graph)
        self.last = last

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and stop at the last one."""
        value = super().run_node(n)
        if n is self.last:
            raise _Reached(value)
        return value
