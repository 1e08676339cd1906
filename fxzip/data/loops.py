"""Running a network over a loader: batches on a device, a progress bar, and modes put back afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxzip.data.bars import Bar, Shown, bar_of
from fxzip.data.batches import Inputs, describe_value, model_inputs, to_device
from fxzip.errors import CalibrationError


def device_of(module: nn.Module) -> torch.device | None:
    """The device of a module's first parameter or buffer, None where it has none."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return None


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for the modules and all in them; each submodule's mode is put back after, also on failure."""
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    try:
        # By the flags, there and back: train() may do more (exported programs refuse it).
        for submodule, _ in modes:
            submodule.training = False
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def batches(
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Shown = True,
    description: str = "",
    max_batches: int | None = None,
    least: int = 1,
) -> Iterator[Iterator[Inputs]]:
    """Iterate over a loader's batches as ``(args, kwargs)`` of a model, on a device, under a progress bar.

        with batches(loader, device=device, description="observing") as inputs:
            for args, kwargs in inputs:
                model(*args, **kwargs)

    The bar (on stderr, with the time left where the loader has a length) is gone when the block ends or
    fails. With ``least=0`` the loader may give no batch: where several processes share one, some may have none.

    Raises:
        CalibrationError: the loader gives no batches or cannot be iterated over, or a batch is of a wrong
        type.
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise CalibrationError(f"a loader must be iterable, {type(loader).__name__} is not") from error
    total = _length(loader)
    if max_batches is not None:
        iterator = itertools.islice(iterator, max_batches)
        total = max_batches if total is None else min(total, max_batches)
    with bar_of(progress) as bar:
        yield _inputs(iterator, device, bar, description, total, least)


@contextmanager
def counted(total: int, progress: Shown, description: str) -> Iterator[Callable[[], None]]:
    """A bar over so many steps; gives a function to call after each of them."""
    with bar_of(progress) as bar:
        if bar is not None:
            bar.phase(description, total)
        yield lambda: None if bar is None else bar.advance()


def feed(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    progress: Shown = True,
    description: str = "",
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    least: int = 1,
) -> int:
    """Call a module on each batch of a loader, as `batches` gives them, without gradients; returns how many.

    Inputs go to ``device``, or to where the module is.

    Raises:
        CalibrationError: as `batches`, or the module fails on a batch (the message has the batch's number and
            shapes). An accelerator out of memory is left as it is.
    """
    count = 0
    place = device if device is not None else device_of(module)
    shown: Any = {"progress": progress, "description": description}
    loop = batches(loader, device=place, max_batches=max_batches, least=least, **shown)
    with torch.no_grad(), loop as inputs:
        for args, kwargs in inputs:
            run(module, count, args, kwargs)
            count += 1
    return count


def run(module: Callable[..., Any], number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module gives for one batch of a loader.

    Raises:
        CalibrationError: As `feed`.
    """
    try:
        return module(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except CalibrationError as error:
        raise CalibrationError(f"batch {number}: {error}") from error
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        message = f"batch {number} of {describe(args, kwargs)} does not fit the model: {error}"
        raise CalibrationError(message) from error


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Inputs in a few words: the shape and type of each tensor, the type of anything else."""
    parts = [describe_value(value) for value in args] + [
        f"{name}={describe_value(value)}" for name, value in kwargs.items()
    ]
    return ", ".join(parts) or "no inputs"


def _length(loader: Iterable[Any]) -> int | None:
    """len(loader), or None: a DataLoader over an iterable dataset has __len__, and raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _inputs(
    iterator: Iterator[Any],
    device: torch.device | str | None,
    bar: Bar | None,
    description: str,
    total: int | None,
    least: int,
) -> Iterator[Inputs]:
    if bar is not None:
        bar.phase(description, total)
    empty = True
    for number, batch in enumerate(iterator):
        empty = False
        try:
            args, kwargs = model_inputs(batch)
            if device is not None:
                args, kwargs = to_device(args, kwargs, torch.device(device))
        except CalibrationError as error:
            raise CalibrationError(f"batch {number}: {error}") from error
        yield args, kwargs
        if bar is not None:
            bar.advance()
    if empty and least:
        raise CalibrationError("the loader gave no batches (is it a generator that was used up before?)")
