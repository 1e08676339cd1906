"""`ZippedModel`: the network that a merge gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fxzip.errors import OptionError
from fxzip.report import Report


class ZippedModel(nn.Module):
    """One trunk, and a head for each task.

    Attributes:
        trunk: The shared network up to the cut; gives a tuple of the tensors that cross it.
        heads: Each model's own rest, by task; takes the tensors that cross the cut.
        names: The tasks, in the order of the models.
        report: What was merged, and what it costs.
    """

    trunk: fx.GraphModule

    def __init__(self, trunk: fx.GraphModule, heads: Mapping[str, fx.GraphModule], report: Report) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self.report = report

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order of the models."""
        return tuple(self.heads)

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """Run the trunk once, then every head, or the one of ``task`` only.

        Args:
            args: The inputs that each of the models took.
            task: Name of a head.
            kwargs: Keyword inputs.

        Returns:
            A tuple of each model's output, in the order of ``names``; with ``task`` that model's output alone.

        Raises:
            OptionError: There is no such task.
        """
        if task is not None and task not in self.heads:
            raise OptionError(f"there is no task {task!r}; the tasks are {', '.join(self.names)}")
        crossing = self.trunk(*args, **kwargs)
        if task is not None:
            return self.heads[task](*crossing)
        return tuple(head(*crossing) for head in self.heads.values())
