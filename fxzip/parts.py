"""Parts: models that are merged by one of their modules, and run whole (detectors, segmenters, two-tower models)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxzip.checks import check_models, models_and_loader, task_names
from fxzip.data.batches import to_device
from fxzip.data.loops import device_of
from fxzip.errors import CalibrationError, OptionError
from fxzip.merged import ZippedModel
from fxzip.surroundings import undisturbed


@dataclass(frozen=True, eq=False)
class ZippedParts:
    """Whole models that share a merged part.

    Attributes:
        models: For each task a copy of the user's own model, whose part is the merged one.
        zipped: The merged part: to save, to export, to report on.
        part: Which module it is.
    """

    models: Mapping[str, nn.Module]
    zipped: ZippedModel
    part: str


@undisturbed
def zip_part(
    *models: Any, part: str, loader: Iterable[Any] | None = None, names: Iterable[str] | None = None, **options: Any
) -> ZippedParts:
    """Merge one module of some models, and give back whole models.

        merged = fxzip.zip_part(detector_a, detector_b, loader, part="backbone")
        boxes = merged.models["dogs"](images)

    The whole models run on the loader's batches up to the part; what goes into it there is what it is merged on.

    Args:
        models: Two models or more, then the loader. They are left as they are.
        part: The module, as ``model.get_submodule`` names it. It must get the same inputs in all models.
        loader: Batches that the whole models take in eval mode: (images, targets) or dicts of keyword inputs; targets
            are left out. Lists of images are passed as they are.
        names: Names of the tasks.
        options: As for `fxzip.zip`.

    Raises:
        OptionError: A model has no such part, or it gets other inputs than in the first model.
        CalibrationError: The models do not take the loader's batches, or do not use the part.
        FxzipError: As for `fxzip.zip`.
    """
    from fxzip.api import zip as merge

    given, loader = models_and_loader(models, loader)
    check_models(given)
    parts = [_part_of(model, part) for model in given]
    tasks = task_names(names, len(given))
    inputs = [PartInputs(model, part, loader) for model in given]
    _check_alike(inputs, part)
    zipped = merge(*parts, loader=inputs[0], names=tasks, **options)
    return put_part(zipped, dict(zip(tasks, given, strict=True)), part)


def put_part(zipped: ZippedModel, models: Mapping[str, nn.Module], part: str) -> ZippedParts:
    """Whole models with a merged part, which may have been loaded.

        merged = fxzip.put_part(fxzip.load("backbone/"), {"dogs": detector_a, "birds": detector_b}, "backbone")

    Args:
        zipped: The merged part.
        models: The models by task; copies of them get the part.
        part: The module that it replaces.

    Raises:
        OptionError: There is no such task, or no such part.
    """
    wholes: dict[str, nn.Module] = {}
    for task, model in models.items():
        zipped.head(task)
        old = _part_of(model, part)
        new = _Part(zipped, task, old)
        wholes[task] = copy.deepcopy(model, {id(old): new}).eval()
    return ZippedParts(wholes, zipped, part)


class _Part(nn.Module):
    """One task of a merged part, in the place of the module that it was, whose plain attributes it has."""

    def __init__(self, zipped: ZippedModel, task: str, old: nn.Module) -> None:
        super().__init__()
        for name, value in vars(old).items():
            if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str, tuple)):
                setattr(self, name, value)
        self.zipped = zipped
        self.task = task

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the part of this task gives."""
        return self.zipped(*args, task=self.task, **kwargs)


class PartInputs:
    """What goes into a part of a model, batch by batch of a loader, as a loader of its own."""

    def __init__(self, model: nn.Module, part: str, loader: Iterable[Any]) -> None:
        # A copy that shares the tensors: the user's model gets no hook and changes no mode, not even for a moment.
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model, self.part, self.loader = copy.deepcopy(model, tensors).eval(), part, loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            args, kwargs = self._inputs(batch)
            if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
                yield args[0]
            else:  # a loader's batch has one input, or inputs by name
                yield dict(inspect.signature(self._module.forward).bind(*args, **kwargs).arguments)

    @property
    def _module(self) -> nn.Module:
        return self.model.get_submodule(self.part)

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run the whole model up to the part.

        Raises:
            CalibrationError: The model does not take the batch, or does not use the part.
        """
        handle = self._module.register_forward_pre_hook(_stop, with_kwargs=True)
        first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
        args, kwargs = ((), dict(first)) if isinstance(first, Mapping) else ((first,), {})
        args, kwargs = to_device(args, kwargs, device_of(self.model))
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        except _Reached as reached:
            return reached.inputs
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError) as error:
            raise CalibrationError(f"the whole model does not take the loader's batches: {error}") from error
        finally:
            handle.remove()
        raise CalibrationError(f"the model does not use its {self.part}")


class _Reached(Exception):
    """The part was reached."""

    def __init__(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached((args, kwargs))


def _part_of(model: nn.Module, part: str) -> nn.Module:
    try:
        return model.get_submodule(part)
    except AttributeError:
        near = ", ".join(name for name, _ in model.named_children())
        raise OptionError(f"{type(model).__name__} has no part {part!r}; it has {near}") from None


def _check_alike(inputs: Sequence[PartInputs], part: str) -> None:
    """Raise where a part gets other inputs than in the first model.

    Raises:
        OptionError: It does.
    """
    for number, batches in enumerate(zip(*(iter(each) for each in inputs), strict=False)):
        leaves = [[leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)] for batch in batches]
        for model, other in enumerate(leaves[1:], 1):
            same = len(other) == len(leaves[0]) and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)
                for a, b in zip(leaves[0], other, strict=True)
            )
            if not same:
                raise OptionError(
                    f"{part} gets other inputs in model {model} than in model 0 (batch {number}): what comes before it "
                    "differs, so that one part cannot stand for both; choose a part that begins at the models' inputs"
                )
        return
