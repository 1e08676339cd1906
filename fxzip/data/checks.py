"""Likely mistakes in the loaders and batches that users give, reported before any work.

A batch that passes is made ready: labels are taken out, and floats get the precision of the models.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from fxzip.data.batches import Inputs, describe_value, given_inputs, map_tensors, model_inputs
from fxzip.data.loaders import as_one_loader
from fxzip.data.shares import Share
from fxzip.errors import CalibrationError, DroppedInputWarning, OptionError
from fxzip.processes import ALONE, Processes

LABELS = frozenset({"label", "labels", "target", "targets"})
"""Keys of a batch that are not inputs, unless a forward requires them."""
_CALL = "fxzip.zip(model_a, model_b, loader)"


def check_order(given: Sequence[Any], call: str = _CALL) -> None:
    """Raise where a loader or an example stands among the models.

    Raises:
        OptionError: One of them gives batches and is not a module.
    """
    for number, value in enumerate(given):
        if not isinstance(value, nn.Module | str | bytes) and isinstance(value, Iterable):
            what = describe_value(value)
            raise OptionError(f"argument {number + 1} of {len(given)} is a {what}, not a model; write {call}")


def ready_loader(loader: Any, names: Sequence[str], models: Sequence[nn.Module], processes: Processes = ALONE) -> Ready:
    """A user's loader, or loaders by task, as one whose batches are ready for the models; see `Ready`.

    Args:
        loader: The loader.
        names: The tasks.
        models: The models.
        processes: Those that share the loader (`fxzip.data.shares`).

    Raises:
        CalibrationError: It cannot be a loader of batches.
        OptionError: It is a model, or there are more or fewer loaders than models.
    """
    if isinstance(loader, Ready):
        return loader
    parts = loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, list | tuple) else ()
    for part in (loader, *(part for part in parts if _is_dataset(part))):
        _check_loader(part)
    return Ready(Share(as_one_loader(loader, names), processes), models)


def first_batch(loader: Ready) -> Any:
    """The first batch, as example inputs, the same in all processes.

    Raises:
        CalibrationError: The loader gives none, or only once.
    """
    processes = loader.processes
    with processes.together("reading the first batch"):
        try:
            iterator = iter(loader)
        except TypeError:
            kind = type(loader.loader).__name__
            raise CalibrationError(
                f"the loader is a {kind}, which gives no batches; use a DataLoader or a list"
            ) from None
        if isinstance(loader.loader, Iterator):
            raise CalibrationError(
                "the loader can be read only once, and it is read several times: use a DataLoader or a list"
            )
        first = next(iterator, None)

    def given() -> Any:
        if first is None:
            raise CalibrationError("the loader is empty: it gave no batch")
        return first

    return processes.agreed("the first batch", given)


def ready_example(given: Any, models: Sequence[nn.Module]) -> Inputs:
    """Positional and keyword inputs from a tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        CalibrationError: As `Ready`.
    """
    return Ready(Share((), ALONE), models).ready(*given_inputs(given))


class Ready:
    """A loader whose batches are ready for the models: labels left out, floats as precise as the parameters.

    Attributes:
        share: Those of its batches that this process reads.
        loader: The loader as it was given.
        processes: Those that share it.
    """

    def __init__(self, share: Share, models: Sequence[nn.Module]) -> None:
        self.share, self.loader, self.processes, self._models = share, share.loader, share.processes, models
        self._dtype, self._needed = _dtype_of(models), _needed_inputs(models[0])
        self._warned = False

    def __iter__(self) -> Iterator[Any]:
        return self._batches(iter(self.share))

    def __len__(self) -> int:
        """Number of batches; raises TypeError where the loader does not know its own."""
        return len(self.share)

    @property
    def whole(self) -> int:
        """Number of batches of all processes together; raises TypeError likewise."""
        return self.share.whole

    def _batches(self, given: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(given):
            try:
                _check_label(batch)
                args, kwargs = self.ready(*model_inputs(batch))
            except CalibrationError as error:
                raise CalibrationError(f"batch {number}: {error}") from error
            yield kwargs or args[0]

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Inputs as the models take them.

        Raises:
            CalibrationError: They are empty, sparse or without values, or an image has no batch axis.
        """
        labels = [name for name in kwargs if name in LABELS and name not in self._needed]
        if labels:
            self._warn(labels)
            kwargs = {name: value for name, value in kwargs.items() if name not in labels}
        if labels and not kwargs and not args:
            raise CalibrationError(f"the batch holds only {', '.join(map(repr, labels))}: give the inputs as well")
        _check_tensors(args, kwargs)
        if args and isinstance(args[0], Tensor) and _lacks_batch_axis(args[0], self._models):
            raise CalibrationError(_single(args[0], args[0]))
        return map_tensors((args, kwargs), self._cast)

    def _cast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone() if tensor.is_inference() else tensor  # those of inference mode have no gradients
        return tensor.to(self._dtype) if tensor.is_floating_point() and self._dtype is not None else tensor

    def _warn(self, labels: Sequence[str]) -> None:
        if not self._warned:
            self._warned = True
            text = f"the batches hold {', '.join(map(repr, labels))}: labels are not inputs of the models, left out"
            warnings.warn(text, DroppedInputWarning, stacklevel=2)


# ---- what may be wrong with a loader


def _is_dataset(value: Any) -> bool:
    """Whether it is a dataset that is read by index, sample by sample."""
    return isinstance(value, Dataset) and not hasattr(type(value), "__iter__")


def _check_loader(loader: Any) -> None:
    if isinstance(loader, nn.Module):
        raise OptionError(f"the loader is a model ({type(loader).__name__}); write {_CALL}")
    if isinstance(loader, Tensor | np.ndarray):
        raise CalibrationError(
            f"the loader is one {describe_value(loader)}, which gives its samples one by one: give a list of batches, "
            "like [images], or images.split(32)"
        )
    if _is_dataset(loader):
        sample = "single samples"
        with suppress(Exception):  # the user's own code
            sample = f"single samples ({describe_value(loader[0])})"
        raise CalibrationError(
            f"the loader is a dataset ({type(loader).__name__}), which gives {sample}: write "
            "DataLoader(dataset, batch_size=32)"
        )


# ---- what may be wrong with a batch


def _check_label(batch: Any) -> None:
    """Raise where a batch is an image, or less, with one label."""
    if not isinstance(batch, list | tuple) or len(batch) < 2 or not isinstance(batch[0], Tensor):
        return
    label = batch[1]
    one = isinstance(label, int | float | str | np.generic) or (isinstance(label, Tensor) and label.dim() == 0)
    if one and batch[0].dim() <= 3:
        raise CalibrationError(_single(batch, batch[0]))


def _single(given: Any, image: Tensor) -> str:
    return (
        f"the loader gave a single sample, {describe_value(given)}, without a batch axis: give batches, like "
        f"{describe_value(image[None])}; DataLoader(samples, batch_size=32) makes them"
    )


def _lacks_batch_axis(image: Tensor, models: Sequence[nn.Module]) -> bool:
    """Whether the models begin with a convolution, for which these are the axes of one image, channels first."""
    first = next((part for part in models[0].modules() if next(part.parameters(recurse=False), None) is not None), None)
    if not isinstance(first, _ConvNd) or image.dim() != len(first.kernel_size) + 1:
        return False
    return image.shape[0] == first.in_channels > 1


def _check_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise CalibrationError(f"a tensor is sparse or nested ({tensor.layout}): give dense ones, by .to_dense()")
    first = next((tensor for tensor in tensors if tensor.dim()), None)
    if first is not None and first.shape[0] == 0:
        raise CalibrationError(f"the batch is empty, {describe_value(first)}: leave it out")


def _dtype_of(models: Sequence[nn.Module]) -> torch.dtype | None:
    """The precision of the models' parameters; None where there are several, or none."""
    found = {p.dtype for model in models for p in model.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _needed_inputs(model: nn.Module) -> frozenset[str]:
    """The inputs that a forward cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)


def integer_hint(inputs: Inputs) -> str:
    """What to say of images of whole numbers, which most layers do not take; empty where there are none."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    whole = [t for t in tensors if t.dtype == torch.uint8 or (t.dim() > 2 and not t.is_floating_point())]
    if not whole:
        return ""
    return f"; {describe_value(whole[0])} holds whole numbers: prepare images as in training, by images.float() / 255"
