"""Compares a traced graph with the model, by numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.data.batches import Inputs, with_batch_size
from fxzip.data.checks import integer_hint
from fxzip.errors import TraceError
from fxzip.passes.trace.copies import eval_copy, has_hooks

SIZES = (2, 3)
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Reference:
    """A model's outputs on its example inputs at two batch sizes.

    Raises:
        TraceError: The model itself cannot run on the example.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model = eval_copy(model, shared=not has_hooks(model))  # a hook may write to parameters
        self._inputs = [with_batch_size(*inputs, size) for size in SIZES]
        self._outputs = [self._tried(inputs, size) for size in SIZES]

    def _tried(self, inputs: Inputs, size: int) -> Any:
        try:
            return _run(self._model, with_batch_size(*inputs, size))
        except Exception as error:
            raise TraceError(
                f"{type(self._model).__name__} itself fails on the example input {_describe(inputs)}, "
                f"resized to a batch of {size}: {type(error).__name__}: {error}{integer_hint(inputs)}"
            ) from error

    def check(self, graph_module: fx.GraphModule, unused: tuple[str, ...]) -> None:
        """Raises TraceError where the graph differs from the model, or hides one of its parameters."""
        for batch, expected in zip(self._inputs, self._outputs, strict=True):
            actual = _run(graph_module, batch)
            difference = compare(expected, actual)
            if difference:
                raise TraceError(
                    f"the traced graph computes something else than the model: {difference}, on {_describe(batch)}"
                )
        if unused:
            self._check_unused(unused)

    def _check_unused(self, unused: tuple[str, ...]) -> None:
        """Parameters that the graph does not reach must not matter: other values change nothing."""
        values = {name: _noise(self._model.get_parameter(name)) for name in unused}
        expected = self._outputs[0]
        actual = _run(lambda *a, **k: torch.func.functional_call(self._model, values, a, k), self._inputs[0])
        difference = compare(expected, actual)
        if difference:
            raise TraceError(
                f"the outputs depend on {', '.join(unused[:5])}, which the traced graph does not reach: {difference}"
            )


def _noise(parameter: Tensor) -> Tensor:
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return parameter.detach().clone()
    return parameter.detach() + torch.randn_like(parameter.detach())


def _run(call: Callable[..., Any], inputs: Inputs) -> Any:
    """The call's output, with the same random numbers each time."""
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, inputs)
    devices = sorted({t.device for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.is_cuda}, key=str)
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        return call(*args, **kwargs)


def compare(expected: Any, actual: Any) -> str | None:
    """How two outputs differ, in words, at the first tensor that does; None where they agree."""
    before, after = dict(_leaves(expected)), dict(_leaves(actual))
    if before.keys() != after.keys():
        missing = sorted(before.keys() ^ after.keys())
        return f"outputs {', '.join(missing)} are in one of them only"
    for path, value in before.items():
        difference = _difference(value, after[path])
        if difference:
            return f"output{path} {difference}"
    return None


def _difference(expected: Tensor, actual: Tensor) -> str | None:
    if expected.shape != actual.shape:
        return f"has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"is {actual.dtype} instead of {expected.dtype}"
    if expected.numel() == 0:
        return None
    if not (expected.is_floating_point() or expected.is_complex()):
        return None if torch.equal(expected, actual) else "has other values"
    precise = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(precise), actual.to(precise)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return "is NaN or infinite at different places"
    scale = float(a[finite].abs().max()) if finite.any() else 0.0
    error = float((a - b)[finite].abs().max()) if finite.any() else 0.0
    tolerance = _TOLERANCES.get(expected.dtype, 1e-4) * scale
    return f"differs by {error:.3g} where the largest value is {scale:.3g}" if error > tolerance else None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, each with where it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}[{field.name!r}]")


def _describe(inputs: Inputs) -> str:
    args, kwargs = inputs
    parts = [_shape(value) for value in args] + [f"{key}={_shape(value)}" for key, value in kwargs.items()]
    return "(" + ", ".join(parts) + ")"


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
