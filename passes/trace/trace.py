"""The first pass: a model becomes a torch.fx graph of torch's own modules, functions and parameters.

1. The user's model is never run, changed or kept: everything happens on copies.
2. Shapes, dtypes and devices are numbers in the graph; only the batch size is symbolic.
3. Only modules of torch.nn without parts are call_module nodes; parameters used directly are get_attr nodes,
   under the names that they have in the model.
4. What cannot be recorded (see `recorder`) goes through ``torch.export``.
5. The graph is compared with the model at two batch sizes: a trace that succeeds can still be wrong.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.data.batches import Inputs, batch_size, to_device
from fxzip.errors import TraceError
from fxzip.passes.trace.chance import warn_of_chance
from fxzip.passes.trace.clean import clean, rebuild
from fxzip.passes.trace.copies import as_written, eval_copy, has_hooks, unwrap, without_some_values
from fxzip.passes.trace.verify import Reference

_NEEDS_VALUES = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_GRAPH_OPS = {"placeholder", "get_attr", "call_module", "call_function", "call_method", "output"}


def trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, verify: bool = True
) -> fx.GraphModule:
    """The graph of ``model`` in eval mode, on its own copies of the parameters.

    Args:
        model: Any module; a GraphModule of torch.nn's modules is copied and used as it is. DataParallel and
            torch.compile are unwrapped.
        args: Example inputs, tensors with the batch on axis 0.
        kwargs: Example keyword inputs.
        verify: Compare the graph with the model on the example, at two batch sizes.

    Returns:
        A GraphModule in eval mode whose ``meta`` holds ``traced_by`` ("symbolic", "export" or "given"),
        ``passed_over``, why earlier ways of tracing failed, and ``unused``, the names of the parameters that the
        forward does not use. Nodes hold a fake value in
        ``meta["val"]`` and the modules around them in ``meta["nn_module_stack"]``.

    Raises:
        TraceError: The model is quantised or TorchScript, it cannot run on the example, its control flow depends on
            values of tensors (the line is named), or the graph computes something else.
    """
    with as_written():
        return _traced(unwrap(model), args, kwargs, verify)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, verify: bool) -> fx.GraphModule:
    _refuse_opaque(model)
    inputs = _on_device_of(model, args, kwargs or {})
    reference = Reference(model, inputs) if verify and not _has_no_values(model, inputs) else None
    failures: list[tuple[str, Exception]] = []
    for name, way in _ways(model):
        try:
            graph_module = clean(way(without_some_values(eval_copy(model)), inputs), _values(name, inputs))
            graph_module.meta["traced_by"] = name
            graph_module.meta["passed_over"] = tuple(f"{other}: {_first_line(error)}" for other, error in failures)
            graph_module.meta["unused"] = _unused(model, graph_module)
            _warn_of_constants(graph_module)
            warn_of_chance(graph_module)
            _check(graph_module, reference)
            return graph_module
        except Exception as error:  # the next way may do
            failures.append((name, error))
    raise _failure(model, failures)


def _check(graph_module: fx.GraphModule, reference: Reference | None) -> None:
    """Compare with the model; hooks that could not be recorded are then known to change nothing."""
    ignored = graph_module.meta.pop("ignored", {})
    hooks = ", ".join(f"{hook} ({why.splitlines()[0]})" for hook, why in ignored.items())
    if hooks and reference is None:
        raise TraceError(f"hooks cannot be followed, and without verification they may change something: {hooks}")
    try:
        if reference is not None:
            reference.check(graph_module, graph_module.meta["unused"])
    except TraceError as error:
        raise TraceError(f"hooks cannot be followed: {hooks}: {error}" if hooks else str(error)) from error
    if hooks:
        warnings.warn(f"hooks only watch, and are left out: {hooks}", stacklevel=4)


def _refuse_opaque(model: nn.Module) -> None:
    """Raise TraceError where weights are packed away or the code is no Python, with what to do instead."""
    for name, module in model.named_modules():
        where = f"{type(model).__name__}{f', at {name!r}' if name else ''}"
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{where}: a TorchScript module cannot be looked into; give the nn.Module that it was made of"
            )
        if type(module).__module__.startswith(_QUANTISED) or any(
            t.is_quantized for t in module._buffers.values() if t is not None
        ):
            raise TraceError(
                f"{where}: {type(module).__name__} is quantised, and quantised weights cannot be averaged; merge the "
                "networks as they were before, then quantise the result"
            )


def _on_device_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    batch_size(args, kwargs)  # says so where there is none
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(parameter.is_meta for parameter in model.parameters()):
        devices = {torch.device("meta")}
    return to_device(args, kwargs, devices.pop()) if len(devices) == 1 else (tuple(args), dict(kwargs))


def _has_no_values(model: nn.Module, inputs: Inputs) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *inputs[0], *inputs[1].values()]
    return any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)


# ---- ways to a graph

Way = Callable[[nn.Module, Inputs], fx.GraphModule]


def _ways(model: nn.Module) -> Iterator[tuple[str, Way]]:
    if isinstance(model, fx.GraphModule) and _is_plain(model):
        yield "given", _as_given
    yield "symbolic", _by_recording
    yield "export", _by_export


def _values(way: str, inputs: Inputs) -> Callable[[fx.GraphModule], dict[fx.Node, Any]]:
    """What gives the values of a graph's nodes: those that were recorded, or those of a run on fake inputs."""

    def values(graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
        from fxzip.passes.trace.record import run_on_fakes

        if way == "symbolic":
            return {node: node.meta["val"] for node in graph_module.graph.nodes if "val" in node.meta}
        return run_on_fakes(graph_module, inputs)

    return values


def _as_given(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    from fxzip.passes.trace.export import plain_given

    assert isinstance(model, fx.GraphModule)
    return plain_given(model, inputs)


def _is_plain(model: fx.GraphModule) -> bool:
    """Whether the graph has only what a traced graph has, and nothing around it."""
    from fxzip.passes.trace.recorder import is_leaf

    if has_hooks(model):
        return False
    calls = [node for node in model.graph.nodes if node.op == "call_module"]
    return all(node.op in _GRAPH_OPS for node in model.graph.nodes) and all(
        str(node.target) == "_guards_fn" or is_leaf(model.get_submodule(str(node.target))) for node in calls
    )


def _by_recording(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    from fxzip.passes.trace.record import record  # imports a good part of torch's compiler

    recorded = record(model, inputs)
    graph_module = rebuild(model, recorded.graph, recorded.attributes)
    graph_module.meta["ignored"] = recorded.ignored
    return graph_module


def _by_export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    from fxzip.passes.trace.export import export

    return export(model, inputs)


# ---- what is reported


def _unused(model: nn.Module, graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the parameters that no node reaches, by all the names that a parameter has."""
    reached = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
    used = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in reached}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) not in used)


def _warn_of_constants(graph_module: fx.GraphModule) -> None:
    """A parameter that is not reached, and a constant that is nobody's: one may be made of the other."""
    constants = [
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
    ]
    unused = graph_module.meta["unused"]
    floating = [name for name in constants if graph_module.get_buffer(name).is_floating_point()]
    if unused and floating:
        warnings.warn(
            f"the model uses {len(floating)} tensor(s) that it neither registers nor computes, and never "
            f"uses {', '.join(unused[:3])}: values that it kept from an earlier run will not be merged",
            stacklevel=3,
        )


def _failure(model: nn.Module, failures: list[tuple[str, Exception]]) -> TraceError:
    """One error for all ways: the first way's, which is in the user's terms, and then the others'."""
    (_, first), *others = failures
    where = user_line(first)
    text = f"{type(model).__name__} could not be traced: " + (f"{where}: " if where else "")
    if type(first).__name__ in _NEEDS_VALUES:
        text += (
            "what happens there depends on the values of a tensor, which a graph cannot follow. Compute both "
            "sides and choose by torch.where, or decide on a shape or a setting of the model; or give a "
            "GraphModule"
        )
    else:
        text += _first_line(first)
    text += "".join(f" ({name}: {_first_line(other)})" for name, other in others)
    error = TraceError(text)
    error.__cause__ = first
    return error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."


def user_line(error: BaseException) -> str | None:
    """``file.py:12 in forward`` for the last frame of ``error`` that is neither torch's nor fxzip's."""
    ours = (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parent),
        str(Path(__file__).parents[1] / "fxzip"),
    )
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not str(Path(frame.filename).resolve()).startswith(tuple(str(Path(o).resolve()) for o in ours))
        and not frame.filename.startswith("<")
    ]
    inside = [frame for frame in frames if frame.name != "trace"]
    if not inside:
        return None
    last = inside[-1]
    source = f" ({last.line})" if last.line else ""
    return f"{last.filename}:{last.lineno}, in {last.name}{source}"
