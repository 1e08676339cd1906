"""Accuracy of a merged network and of the networks that it was merged from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxzip.data.loops import counted, device_of, evaluating
from fxzip.errors import CalibrationError
from fxzip.merged import ZippedModel


class Batches(Protocol):
    """Batches (images, labels), labels being int64 (batch,), and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one network in percent; None for what it cannot answer.

    Attributes:
        name: The network.
        tasks: By task: the right class among the task's own.
        images: By task: how many images were measured.
        joint: The right class among those of all tasks, by the largest logit of any head.
    """

    name: str
    tasks: dict[str, float]
    images: dict[str, int]
    joint: float | None = None

    @property
    def average(self) -> float:
        """The mean over tasks."""
        return sum(self.tasks.values()) / len(self.tasks)


Classes = Mapping[str, Sequence[str] | None]


def measure(
    zipped: ZippedModel, loaders: Mapping[str, Batches], classes: Classes | None = None, *, progress: bool = True
) -> Accuracy:
    """The accuracy of a merged network.

    Args:
        zipped: The network; its heads give logits (batch, classes).
        loaders: By task, in any order: the batches; a ``DataLoader`` will do.
        classes: By task: the names of its classes, of which its head must have as many.
        progress: Show bars.

    Raises:
        CalibrationError: A head gives no logits, or has another number of classes.
    """
    right: dict[str, int] = {}
    count: dict[str, int] = {}
    joint = 0
    order = list(zipped.names)
    for task, loader in loaders.items():
        right[task] = count[task] = 0
        for outputs, labels in _outputs(zipped, loader, task, progress):
            logits = [_logits(value, name) for name, value in zip(order, outputs, strict=True)]
            own = order.index(task)
            _check_labels(labels, logits[own], task, (classes or {}).get(task))
            right[task] += int((logits[own].argmax(1) == labels).sum())
            before = sum(value.shape[1] for value in logits[:own])
            joint += int((torch.cat(logits, 1).argmax(1) == labels + before).sum())
            count[task] += len(labels)
    tasks = {task: 100 * right[task] / count[task] for task in loaders}
    whole = len(loaders) == len(order) > 1
    return Accuracy(" + ".join(order), tasks, count, 100 * joint / sum(count.values()) if whole else None)


def measure_one(task: str, model: nn.Module, loader: Batches, *, progress: bool = True) -> Accuracy:
    """The accuracy of one network on its own task; see `measure`."""
    right = count = 0
    for output, labels in _outputs(model, loader, f"{task} alone", progress):
        logits = _logits(output, task)
        _check_labels(labels, logits, task, None)
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return Accuracy(f"{task} alone", {task: 100 * right / count}, {task: count})


def table(rows: Sequence[Accuracy], tasks: Sequence[str]) -> str:
    """The rows as a table of plain text."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fxzip.report import render

    shown = Table(box=SIMPLE_HEAD, title="accuracy in %", title_justify="left")
    for heading in ("network", *tasks, "average", "joint"):
        shown.add_column(heading, justify="left" if heading == "network" else "right", overflow="fold")
    for row in rows:
        percents = (row.tasks.get(task) for task in tasks)
        average = row.average if len(row.tasks) == len(tasks) else None
        values = ("-" if x is None else f"{x:.1f}" for x in (*percents, average, row.joint))
        shown.add_row(row.name, *values)
    shown.add_row("images", *(str(rows[0].images[task]) for task in tasks), "", "")
    return render(shown)


def _outputs(model: nn.Module, loader: Batches, text: str, progress: bool) -> Iterator[tuple[Any, Tensor]]:
    """A network's outputs on a loader's images, and their labels."""
    device = device_of(model)
    with evaluating(model), counted(len(loader), progress, f"measuring {text}") as step:
        for images, labels in loader:
            with torch.no_grad():
                output = model(images.to(device))
            yield output, labels.to(device)
            step()


def _logits(value: Any, task: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 2:
        what = f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CalibrationError(f"the head of {task} gives {what}; accuracy needs logits (batch, classes)")
    return value


def _check_labels(labels: Tensor, logits: Tensor, task: str, classes: Sequence[str] | None) -> None:
    size = logits.shape[1]
    if classes is not None and len(classes) != size:
        raise CalibrationError(
            f"{task}: the images are in folders of {len(classes)} classes ({', '.join(classes[:4])}...), and the head "
            f"has {size}; give every class a folder, even one without images"
        )
    if int(labels.max()) >= size or int(labels.min()) < 0:
        raise CalibrationError(f"{task}: a label is {int(labels.max())}, and the head has {size} classes from 0 on")
