"""How networks are prepared: traced, written alike, aligned and analysed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.batches import Inputs, to_device
from fxzip.data.checks import ready_example
from fxzip.data.loops import device_of
from fxzip.data.pixels import check_pixels
from fxzip.errors import AlignmentError
from fxzip.fingerprint import check_same
from fxzip.information import gathered
from fxzip.joining import inner_names, is_task
from fxzip.originals import Originals
from fxzip.passes.align import align
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.deepen import deepen
from fxzip.passes.fold import fold
from fxzip.passes.linearise import linearise
from fxzip.passes.linearity import linearity
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier
from fxzip.passes.widen import widen
from fxzip.prepared import Prepared
from fxzip.processes import ALONE, Processes
from fxzip.report import Verified


def prepared_of(
    each: Sequence[Any], example_inputs: Any, tasks: tuple[str, ...], verify: bool,
    labels: Mapping[str, Iterable[str]] | None = None, processes: Processes = ALONE, linear: bool = False,
) -> Prepared:  # fmt: skip
    """As `prepare`, of one network or more that were checked."""
    check_same(processes, each)
    args, kwargs = ready_example(example_inputs, each)
    graphs = [canonicalise(traced(model, args, kwargs)) for model in each]
    folded = any(map(is_task, each))
    if folded:
        graphs = [fold(graph) for graph in graphs]
    example = to_device(args, kwargs, device_of(graphs[0]))
    if linear:
        graphs = [linearise(graph, analyse_graph(graph, *example))[0] for graph in graphs]
    alike = widen(deepen(graphs, example), example)
    alignment = align(alike)
    if not alignment.shared_parameters():
        raise AlignmentError(
            f"the models share no layer: {alignment.parting}; stitch=True merges networks that share nothing"
        )
    check_pixels(graphs, tasks, (args, kwargs))
    example = to_device(args, kwargs, device_of(alignment.modules[0]))
    spec, verified = analysed(alignment.modules[0], example, verify)
    spec = linearity(alignment.modules[0], spec) if linear else spec
    originals = Originals.of(each, alignment) if alike == graphs and not (folded or linear) else None
    return Prepared(tasks, alignment, spec, verified, originals, gathered(each, tasks, labels, example), processes)


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """A model's graph; that of a merged network's task has the names that its layers had before."""
    graph = trace(model, args, kwargs)
    return inner_names(graph) if is_task(model) else graph


def analysed(module: fx.GraphModule, example: Inputs, verify: bool) -> tuple[ChannelSpec, Verified | None]:
    """The channel spaces, and what was checked of them: nothing where parameters have no values."""
    spec = analyse_graph(module, *example)
    if not verify or any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return spec, None
    return Verifier(module, example).checked_spec(spec)
