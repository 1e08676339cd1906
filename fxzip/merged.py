"""`ZippedModel`: the network that a merge gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs
from fxzip.errors import OptionError
from fxzip.hub import OnHub
from fxzip.information import Information
from fxzip.names import bad_name
from fxzip.report import Report

if TYPE_CHECKING:
    from fxzip.export import Export
    from fxzip.originals import Originals
    from fxzip.prediction import Prediction


class ZippedModel(nn.Module, OnHub):
    """One trunk, and a head for each task; it can be pushed to the Hugging Face hub (`fxzip.hub.OnHub`).

    Attributes:
        trunk: The shared network up to the cut; gives a tuple of the tensors that cross it.
        heads: Each model's own rest, by task; takes the tensors that cross the cut.
        names: The tasks, in the order of the models.
        example: Inputs (args, kwargs) of the right shapes, of two samples or more; None if nobody gave any.
        originals: The models' own classes, without weights; None where the network was loaded.

    Raises:
        OptionError: A task has a name that is no plain word (`fxzip.names`).
    """

    trunk: fx.GraphModule

    def __init__(
        self,
        trunk: fx.GraphModule,
        heads: Mapping[str, fx.GraphModule],
        report: Report,
        example: Inputs | None = None,
    ) -> None:
        super().__init__()
        wrong = bad_name(heads)
        if wrong is not None:
            raise OptionError(wrong)
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self._report = report
        self.originals: Originals | None = None
        self._information = Information()
        self._places = {name: place for place, name in enumerate(self.heads)}
        # A copy, so that two samples do not keep a whole batch in memory.
        self.example = pytree.tree_map_only(Tensor, Tensor.clone, example)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of the models."""
        return tuple(self.heads)

    @property
    def report(self) -> Report:
        """What was merged, and what it costs, with the heads that there are."""
        from fxzip.narrowing import narrowed

        return narrowed(self._report, self.names)

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report

    def head(self, task: str) -> fx.GraphModule:
        """The head of a task.

        Raises:
            OptionError: There is no such task.
        """
        if task not in self.heads:
            raise OptionError(f"there is no task {task!r}; the tasks are {', '.join(self.names)}")
        return cast(fx.GraphModule, self.heads[task])

    @property
    def information(self) -> Information:
        """How images are prepared and what the classes are called, of the heads that there are."""
        return self._information.some(self.names)

    @information.setter
    def information(self, information: Information) -> None:
        self._information = information

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes of each task whose names are known."""
        return dict(self.information.labels)

    def place(self, task: str) -> int:
        """Which of the models that were merged a task was, counted from 0."""
        return self._places[task]

    def forward(self, *args: Any, task: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the trunk once, then every head, or those of some tasks only.

        Args:
            args: The inputs that each of the models took.
            task: Name of a head, or a list of names.
            kwargs: Keyword inputs.

        Returns:
            A tuple of each model's output, in the order of ``names``; with a list those of these tasks, in its order;
            with one name that output alone.

        Raises:
            OptionError: There is no such task, or the list is empty.
        """
        if isinstance(task, str):
            chosen = self.head(task)
            return chosen(*self.trunk(*args, **kwargs))
        heads = [self.head(name) for name in self._checked(task)] if task is not None else list(self.heads.values())
        crossing = self.trunk(*args, **kwargs)
        return tuple(head(*crossing) for head in heads)

    def select(self, tasks: Iterable[str]) -> ZippedModel:
        """The merged network with some of its heads only; it shares its tensors with this one.

            zipped.select(["dogs"]).export("dogs.onnx")

        Args:
            tasks: The tasks, in the order in which they are wanted.

        Returns:
            Another network, whose report is that of these tasks.

        Raises:
            OptionError: There is no such task, one is given twice, or none.
        """
        names = self._checked(tasks)
        chosen = ZippedModel(self.trunk, {name: self.head(name) for name in names}, self._report, self.example)
        chosen.originals, chosen._places, chosen.information = self.originals, self._places, self._information
        return chosen.train(self.training)

    def _checked(self, tasks: Iterable[str]) -> list[str]:
        """Names of heads, all different.

        Raises:
            OptionError: They are not.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        for name in names:
            self.head(name)
        if not names or len(set(names)) < len(names):
            raise OptionError(f"tasks are {names!r}: give some of {', '.join(self.names)}, each once")
        return names

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Change all tensors (``to``, ``half``...); the example stays where it is, in the precision of the weights."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def in_precision(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_zeros(1)).dtype) if tensor.is_floating_point() else tensor

        self.example = pytree.tree_map_only(Tensor, in_precision, self.example)
        return self

    def predict(
        self, image: Any, *, task: str | Iterable[str] | None = None, top: int = 5
    ) -> dict[str, tuple[Prediction, ...]]:
        """The likeliest classes of one image, for each task.

            zipped.predict("image.jpg")["dogs"][0]  # Prediction(label='beagle', number=3, score=0.98)

        Args:
            image: A file, an image of Pillow's, or a tensor (channels, height, width) that is prepared already.
            task: A task, or some; None: all.
            top: How many classes.

        Returns:
            For each task its classes, the likeliest first.

        Raises:
            OptionError: The image cannot be read, how images are prepared is not known, there is no such task, or its
                output has no classes.
        """
        from fxzip.prediction import predict

        return predict(self, image, task=task, top=top)

    def as_models(self, models: Any = None) -> dict[str, nn.Module]:
        """For each task a copy of the user's own module with the merged weights: the same class, the same keys.

            dogs, birds = zipped.as_models().values()
            dogs.forward_features(images)

        The tensors of the trunk are shared by all of them: two models take the memory of one and of the heads. What
        refit has folded into a layer is unfolded; BatchNorms get the statistics 0 and 1. Each model is checked against
        the merged network on the example.

        Args:
            models: Modules of the classes that were merged, in the order of the tasks or by task, whatever their
                weights: only needed where the network was loaded.

        Returns:
            The models by task, in eval mode.

        Raises:
            RestoreError: Something in the merged network has no place in the class, and is named; or the network is
                stitched, so that there is no such class.
            OptionError: ``models`` are not one for each task.
        """
        from fxzip.originals import as_models

        return as_models(self, models)

    def save(
        self,
        folder: str | PathLike[str],
        *,
        layout: Literal["fxzip", "models", "deltas"] = "fxzip",
        overwrite: bool = False,
    ) -> Path:
        """Save to a folder.

        Args:
            folder: Where to; it appears whole or not at all.
            layout: ``fxzip``: one network that `fxzip.load` reads, see `fxzip.io.save`. ``models``: a checkpoint for
                each task in the keys of its own class, see `fxzip.checkpoint_folder.save_models`; ``deltas``: the same
                with the trunk's tensors in one file, and the others' in one for each task.
            overwrite: Write even into a folder that holds other files.

        Returns:
            The folder.

        Raises:
            OptionError: There is no such layout.
            SaveError, RestoreError: As for these functions.
        """
        from fxzip.checkpoint_folder import save_models
        from fxzip.io import save

        if layout not in ("fxzip", "models", "deltas"):
            raise OptionError(f"layout={layout!r}: it must be 'fxzip', 'models' or 'deltas'")
        if layout == "fxzip":
            return save(self, folder, overwrite=overwrite)
        return save_models(self, folder, overwrite=overwrite, once=layout == "deltas")

    def draw(self, path: str | PathLike[str]) -> Path:
        """Draw the trunk and the heads (``.svg``, ``.png``, ``.pdf``, ``.dot`` or ``.mmd``); see `fxzip.draw`."""
        from fxzip.views.draw import draw

        return draw(self, path)

    def export(
        self,
        path: str | PathLike[str],
        *,
        task: str | None = None,
        opset: int | None = None,
        example_inputs: Any = None,
    ) -> Export:
        """Export to ONNX (``.onnx``) or torch.export (``.pt2``); see `fxzip.export.export`."""
        from fxzip.export import export

        return export(self, path, task=task, opset=opset, example_inputs=example_inputs)
