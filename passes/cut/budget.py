"""Budget: what each cut costs, in floating-point operations, before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.data.batches import with_batch_size
from fxzip.errors import CutError, TraceError
from fxzip.flops import flop_counter
from fxzip.graphs import bind_inputs
from fxzip.passes.align import Alignment

_BUDGET = re.compile(r"\s*flops\s*<=?\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*x\s*", re.IGNORECASE)
_FIDELITY = re.compile(r"\s*fidelity\s*>=?\s*(0?\.\d+|0|1(?:\.0*)?)\s*", re.IGNORECASE)


def parse_budget(cut: object) -> float | None:
    """The bound of a cut like ``"flops<=1.3x"``, in multiples of one network's FLOPs; None for another kind of cut.

    Raises:
        CutError: It starts like a budget but cannot be read as one.
    """
    return _bound(cut, "flops", _BUDGET, 'a budget as "flops<=1.3x", in multiples of one network\'s FLOPs')


def parse_fidelity(cut: object) -> float | None:
    """The bound of a cut like ``"fidelity>=0.98"``, a share from 0 to 1; None for another kind of cut.

    Raises:
        CutError: It starts like one but cannot be read.
    """
    return _bound(cut, "fidelity", _FIDELITY, 'a bound on fidelity as "fidelity>=0.98", a share from 0 to 1')


def _bound(cut: object, word: str, form: re.Pattern[str], wanted: str) -> float | None:
    """The number in a cut that starts with a word; None where it does not."""
    if not isinstance(cut, str) or not cut.lower().lstrip().startswith(word):
        return None
    found = form.fullmatch(cut)
    if found is None:
        raise CutError(f"cut={cut!r}: write {wanted}")
    return float(found[1])


@dataclass(frozen=True)
class Counts:
    """What the nodes of a graph do for one example, by name.

    Attributes:
        flops: Floating-point operations.
        sizes: Elements of the node's value; 0 where it is no tensor.
    """

    flops: dict[str, int]
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """The floating-point operations of all nodes."""
        return sum(self.flops.values())


class _Counting(fx.Interpreter):
    """Runs a graph and counts."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.counts = Counts({}, {})

    def run_node(self, n: fx.Node) -> Any:
        with flop_counter() as counter:
            result = super().run_node(n)
        self.counts.flops[n.name] = int(counter.get_total_flops())
        self.counts.sizes[n.name] = result.numel() if isinstance(result, Tensor) else 0
        return result


def count(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Counts:
    """Run a graph on one example of a batch, and count.

    Raises:
        TraceError: It does not run on a batch of one.
    """
    args, kwargs = with_batch_size(*example, 1)
    counting = _Counting(module)
    with on_one_sample(), torch.no_grad():
        counting.run(*bind_inputs(module, args, kwargs).values())
    return counting.counts


@contextmanager
def on_one_sample() -> Iterator[None]:
    """Where a model runs on a batch of one, as it must; raises TraceError where it does not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TraceError(
            "the model fails on a batch of 1, on which its operations are counted: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def cost_of_cuts(alignment: Alignment, places: Sequence[int], counts: Sequence[Counts]) -> dict[int, float]:
    """What the trunk and all heads cost at each place, in multiples of the mean network's FLOPs.

    What a head spends on finding its channels again is not counted; it is nothing where U folds into the next
    layer or is a gather.

    Args:
        alignment: The traced models.
        places: Places for a cut.
        counts: Of each model.
    """
    saved = [0]
    for names in alignment.shared:
        saved.append(saved[-1] + sum(own.flops[name] for own, name in zip(counts[1:], names[1:], strict=True)))
    total = sum(own.total for own in counts)
    return {place: (total - saved[place]) / _mean(counts) for place in places}


def cost_of_joins(alignment: Alignment, channels: Mapping[int, int], counts: Sequence[Counts]) -> float:
    """What it costs to join stems, in multiples of the mean network's FLOPs.

    Args:
        alignment: The traced models.
        channels: How many channels there are in each of the shared nodes that are joined, by its place.
        counts: Of each model.
    """
    sizes = counts[0].sizes
    joined = sum(2 * len(counts) * size * sizes[alignment.shared[place][0]] for place, size in channels.items())
    return joined / _mean(counts)


def _mean(counts: Sequence[Counts]) -> float:
    return max(sum(own.total for own in counts) / len(counts), 1)


def cut_within(costs: Mapping[int, float], budget: float) -> int:
    """The earliest place that the budget allows: of those the least is merged.

    Raises:
        CutError: No place is within the budget; the message names the cheapest.
    """
    allowed = [place for place, cost in costs.items() if cost <= budget]
    if not allowed:
        raise CutError(f"no cut costs at most {budget:g} networks' FLOPs; the cheapest costs {min(costs.values()):.3f}")
    return min(allowed)
