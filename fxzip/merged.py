"""`ZippedModel`: the network that a merge gives."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs
from fxzip.errors import OptionError
from fxzip.names import bad_name
from fxzip.report import Report

if TYPE_CHECKING:
    from fxzip.export import Export


class ZippedModel(nn.Module):
    """One trunk, and a head for each task.

    Attributes:
        trunk: The shared network up to the cut; gives a tuple of the tensors that cross it.
        heads: Each model's own rest, by task; takes the tensors that cross the cut.
        names: The tasks, in the order of the models.
        report: What was merged, and what it costs.
        example: Inputs (args, kwargs) of the right shapes, of two samples or more; None if nobody gave any.

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
        self.report = report
        # A copy, so that two samples do not keep a whole batch in memory.
        self.example = pytree.tree_map_only(Tensor, Tensor.clone, example)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of the models."""
        return tuple(self.heads)

    def head(self, task: str) -> fx.GraphModule:
        """The head of a task.

        Raises:
            OptionError: There is no such task.
        """
        if task not in self.heads:
            raise OptionError(f"there is no task {task!r}; the tasks are {', '.join(self.names)}")
        return cast(fx.GraphModule, self.heads[task])

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Run the trunk once, then every head, or the one of ``task`` only.

        Args:
            args: The inputs that each of the models took.
            task: Name of a head.
            kwargs: Keyword inputs.

        Returns:
            A tuple of each model's output, in the order of ``names``; with ``task`` that output alone.

        Raises:
            OptionError: There is no such task.
        """
        chosen = None if task is None else self.head(task)
        crossing = self.trunk(*args, **kwargs)
        if chosen is not None:
            return chosen(*crossing)
        return tuple(head(*crossing) for head in self.heads.values())

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Save to a folder that `fxzip.load` reads; see `fxzip.io.save`."""
        from fxzip.io import save

        return save(self, folder, overwrite=overwrite)

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
