"""Budget: what each cut costs, in floating-point operations, before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.data.batches import with_batch_size
from fxzip.errors import CutError
from fxzip.flops import flop_counter
from fxzip.graphs import bind_inputs
from fxzip.passes.align import Alignment

_BUDGET = re.compile(r"\s*flops\s*<=?\s*([0-9.]+(?:e[+-]?\d+)?)\s*x\s*", re.IGNORECASE)


def parse_budget(cut: object) -> float | None:
    """The bound of a cut like ``"flops<=1.3x"``, in networks; None for another kind of cut.

    Raises:
        CutError: It begins like a budget and is none.
    """
    if not isinstance(cut, str) or not cut.lower().lstrip().startswith("flops"):
        return None
    found = _BUDGET.fullmatch(cut)
    if found is None:
        raise CutError(f'cut={cut!r}: write a budget as "flops<=1.3x", in multiples of one network\'s FLOPs')
    return float(found[1])


class _Counting(fx.Interpreter):
    """Runs a graph and keeps the FLOPs of each node, and how many elements its value has."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.flops: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with flop_counter() as counter:
            result = super().run_node(n)
        self.flops[n.name] = int(counter.get_total_flops())
        self.sizes[n.name] = result.numel() if isinstance(result, Tensor) else 0
        return result


def _counted(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> _Counting:
    """What each node costs and gives for one example."""
    args, kwargs = with_batch_size(*example, 1)
    counting = _Counting(module)
    with torch.no_grad():
        counting.run(*bind_inputs(module, args, kwargs).values())
    return counting


def flops_by_node(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, int]:
    """The floating-point operations of each node for one example."""
    return _counted(module, example).flops


def cost_of_cuts(
    alignment: Alignment, places: Sequence[int], example: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[int, float]:
    """What the trunk and all heads cost at each place, in multiples of the mean network's FLOPs.

    What a head spends on finding its channels again is not counted; it is nothing where U folds into the next
    layer or is a gather.
    """
    flops = [flops_by_node(module, example) for module in alignment.modules]
    mean = sum(sum(found.values()) for found in flops) / len(flops)
    saved = [0]
    for names in alignment.shared:
        saved.append(saved[-1] + sum(found[name] for found, name in zip(flops[1:], names[1:], strict=True)))
    total = sum(sum(found.values()) for found in flops)
    return {place: (total - saved[place]) / max(mean, 1) for place in places}


def cost_of_joins(
    alignment: Alignment, channels: Mapping[int, int], example: tuple[tuple[Any, ...], dict[str, Any]]
) -> float:
    """What it costs to join stems, in multiples of the mean network's FLOPs.

    Args:
        alignment: The traced models.
        channels: How many channels there are in each of the shared nodes that are joined, by its place.
        example: The inputs.
    """
    found = [_counted(module, example) for module in alignment.modules]
    mean = sum(sum(each.flops.values()) for each in found) / len(found)
    joined = sum(2 * len(found) * size * found[0].sizes[alignment.shared[i][0]] for i, size in channels.items())
    return joined / max(mean, 1)


def cut_within(costs: Mapping[int, float], budget: float) -> int:
    """The earliest place that the budget allows: of those the least is merged.

    Raises:
        CutError: None is; the cheapest that there is, is named.
    """
    allowed = [place for place, cost in costs.items() if cost <= budget]
    if not allowed:
        raise CutError(f"no cut costs at most {budget:g} networks' FLOPs; the cheapest costs {min(costs.values()):.3f}")
    return min(allowed)
