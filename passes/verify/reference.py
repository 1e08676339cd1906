"""The reference of checks: a copy of a network, inputs, and what it gives for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs, with_batch_size
from fxzip.graphs import bind_inputs
from fxzip.passes.verify.precision import TOLERANCES, Precision, own_precision, precision_for


@dataclass(frozen=True, eq=False)
class Reference:
    """What merges are compared with.

    Attributes:
        precision: What it is computed in.
        module: A copy of the network.
        inputs: In the order of its placeholders.
        outputs: What it gives for them.
    """

    precision: Precision
    module: fx.GraphModule
    inputs: tuple[Any, ...]
    outputs: Any


def reference(module: fx.GraphModule, example: Inputs, samples: int, generator: Generator) -> Reference:
    """A copy with other parameters, all of which matter, in as many bits as do.

    Networks that hold their own dtype (a sum in float32 that meets weights) run in that, and networks that round inside
    (to float32 and back) are compared as exactly as that allows.
    """
    bound = tuple(bind_inputs(module, *with_batch_size(*example, samples)).values())
    wide = precision_for(module)
    for precision, change in ((wide, True), (wide, False), (own_precision(module), False)):
        inputs = tuple(precision.cast(value) for value in bound)
        copied = precision.changed(module, generator) if change else precision.copied(module)
        watching = _Watching(copied)
        try:
            with torch.no_grad():
                outputs = watching.run(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))
        except (RuntimeError, TypeError, ValueError):
            continue  # it does not run in float64
        if precision.dtype is None or _is_finite(outputs):
            loosest = max([precision.tolerance, *(TOLERANCES.get(kind, 0.0) for kind in watching.kinds)])
            return Reference(replace(precision, tolerance=loosest), copied, inputs, outputs)
    raise AssertionError("a network that was traced runs on its example")


class _Watching(fx.Interpreter):
    """Runs a graph, and notes the dtypes of its values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kinds: set[torch.dtype] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        self.kinds.update(leaf.dtype for leaf in tensors_in(result) if n.op not in ("placeholder", "get_attr"))
        return result


def run(module: nn.Module, inputs: Sequence[Any]) -> Any:
    """What a network gives, without gradients, and with the same random numbers always; it gets tensors of its own."""
    devices = sorted({t.device.index for t in tensors_in(inputs) if t.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return module(*pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs)))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(value))


def error_of(wanted: Any, found: Any) -> float:
    """The largest difference of nested outputs, as a share of each tensor's largest value.

    Infinite where they differ in shape, or are finite at other places.
    """
    expected, given = tensors_in(wanted), tensors_in(found)
    if len(expected) != len(given) or any(a.shape != b.shape for a, b in zip(expected, given, strict=True)):
        return float("inf")
    return max((_error(a, b) for a, b in zip(expected, given, strict=True)), default=0.0)


def _error(wanted: Tensor, found: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, found) else float("inf")
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    expected, given = (torch.where(finite, t, 0).to(kind) for t in (wanted, found))
    return float((expected - given).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
