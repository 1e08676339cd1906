"""One run of a model on fake inputs of a symbolic batch size, written down by `recorder`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs, batch_size, with_batch_size
from fxzip.errors import TraceError
from fxzip.passes.trace.functional import fake_run
from fxzip.passes.trace.recorder import GraphRecorder
from fxzip.passes.trace.writes import without_shape_changes

# Fake tensors cost nothing, and a size that nothing else in a model has keeps the batch apart from the rest.
BATCH_HINT = 13


def record(model: nn.Module, inputs: Inputs) -> GraphRecorder:
    """Runs ``model`` (a copy in eval mode that has never run) on fake inputs, and gives its graph.

    Returns:
        What was recorded: the graph, and what its ``get_attr`` and ``call_module`` targets stand for.

    Raises:
        TraceError: The batch size became a constant.
        Exception: Whatever the model raises where it reads a tensor's values.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    args, kwargs = _fake_inputs(mode, inputs)
    recorder = GraphRecorder(model)
    for name, value in bound_arguments(model, args, kwargs).items():
        recorder.add_input(name, value)
    recorder.wrap()
    try:
        with torch.no_grad(), enable_python_dispatcher(), mode, recorder:
            output = model(*args, **kwargs)
    finally:
        recorder.release()
    recorder.add_output(output)
    if not recorder.knows_batch():
        raise TraceError("the model fixes the batch size: it loops over the samples or compares their number")
    return recorder


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by the names under which the model's ``forward`` takes them, in order."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{index}": part for index, part in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _fake_inputs(mode: FakeTensorMode, inputs: Inputs) -> Inputs:
    size = batch_size(*inputs)
    args, kwargs = with_batch_size(*inputs, BATCH_HINT)
    count = iter(range(1 << 30))

    def fake(before: Tensor, tensor: Tensor) -> Tensor:
        # Axes of the hinted size share one symbol (duck shapes): the inputs' batches are the same batch.
        batched = before.dim() > 0 and before.shape[0] == size
        sizes = [DimDynamic.STATIC] * tensor.dim()
        if batched:
            sizes[0] = DimDynamic.DUCK
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor.clone(), source=ConstantSource(f"input{next(count)}"), symbolic_context=context)

    def convert(before: Any, after: Any) -> Any:
        return fake(before, after) if isinstance(after, Tensor) else after

    faked: Inputs = pytree.tree_map(convert, (tuple(inputs[0]), dict(inputs[1])), (args, kwargs))
    return faked


def run_on_fakes(module: fx.GraphModule, inputs: Inputs) -> dict[fx.Node, Any]:
    """What each node of a graph that was not recorded gives: fake tensors that share memory as the real ones do."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for node in module.graph.nodes:
        without_shape_changes(node)
    named = bound_arguments(module, *_fake_inputs(mode, inputs))
    given = [named.get(str(node.target), *node.args[:1]) for node in module.graph.find_nodes(op="placeholder")]
    return _Values(module, mode).of(given)


class _Values(fx.Interpreter):
    """Runs a graph on fake tensors and keeps what every node gives."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._mode = mode

    def of(self, given: list[Any]) -> dict[fx.Node, Any]:
        """The values for these inputs, one for each placeholder."""
        with fake_run(self._mode):
            self.run(*given, enable_io_processing=False)
        return self.env

    def fetch_attr(self, target: str) -> Any:
        """A tensor of the module, as fake as all else."""
        found = super().fetch_attr(target)
        return self._mode.from_tensor(found, static_shapes=True) if isinstance(found, Tensor) else found
