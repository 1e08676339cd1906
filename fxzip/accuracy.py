"""Accuracy of a merged network and of the networks that it was merged from; of language models perplexity, too.

rows = [measure(zipped, loaders), measure_one("dogs", dogs, loaders["dogs"])]
print(table(rows, zipped.names))

measure_tokens(zipped, {"prose": prose, "code": code})  # token ids (n, length)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxzip.data.batches import Inputs, model_inputs, to_device
from fxzip.data.loops import counted, device_of, evaluating, run
from fxzip.data.tokens import BATCH, TokenBatches
from fxzip.errors import CalibrationError
from fxzip.merged import ZippedModel
from fxzip.scores import LEFT_OUT, logits_for


class Batches(Protocol):
    """Batches (inputs, labels), and how many there are.

    Inputs are a tensor, or a dict of keyword inputs. Labels are int64 (batch,), or (batch, tokens): the next token of
    each place, or `LEFT_OUT` (-100).
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]: ...


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one network in percent; None for what it cannot answer.

    Attributes:
        name: The network.
        tasks: By task: the right class among the task's own; of language models the right next token.
        measured: By task: on how many images, or tokens that follow another one.
        joint: The right class among those of all tasks, by the largest logit of any head.
        perplexity: By task, of language models: e to the mean negative log likelihood of the next token.
    """

    name: str
    tasks: dict[str, float]
    measured: dict[str, int]
    joint: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """The mean over tasks."""
        return sum(self.tasks.values()) / len(self.tasks)


Classes = Mapping[str, Sequence[str] | None]


def measure(
    zipped: ZippedModel, loaders: Mapping[str, Batches], classes: Classes | None = None, *, progress: bool = True
) -> Accuracy:
    """The accuracy of a merged network; where labels are those of places, its perplexity, too.

    Args:
        zipped: The network; its heads give logits (batch, classes), or (batch, tokens, vocabulary).
        loaders: By task, in any order: the batches; a ``DataLoader`` will do.
        classes: By task: the names of its classes, of which its head must have as many.
        progress: Show bars.

    Raises:
        CalibrationError: A head gives no logits, or has another number of classes.
        OptionError: There is no such task.
    """
    for task in loaders:
        zipped.head(task)
    tallies = {task: _Tally() for task in loaders}
    joint = 0
    order = list(zipped.names)
    for task, loader in loaders.items():
        for number, inputs, labels in _batches(zipped, loader, task, progress):
            asked = [task] if labels.dim() > 1 else order  # one text has no joint choice among vocabularies
            outputs = _answer(partial(zipped, task=asked), number, inputs)
            pairs = zip(asked, outputs, strict=True)
            logits = {name: logits_for(output, name, labels.shape) for name, output in pairs}
            _check_labels(labels, logits[task], task, (classes or {}).get(task))
            tallies[task].add(logits[task], labels)
            if asked is order:
                before = sum(logits[name].shape[1] for name in order[: order.index(task)])
                joint += int((torch.cat(list(logits.values()), 1).argmax(1) == labels + before).sum())
    whole = len(loaders) == len(order) > 1 and not any(tally.places for tally in tallies.values())
    total = sum(tally.count for tally in tallies.values())
    return _row(" + ".join(order), tallies, 100 * joint / total if whole else None)


def measure_one(task: str, model: nn.Module, loader: Batches, *, progress: bool = True) -> Accuracy:
    """The accuracy of one network on its own task; see `measure`."""
    tally = _Tally()
    for number, inputs, labels in _batches(model, loader, f"{task} alone", progress):
        logits = logits_for(_answer(model, number, inputs), task, labels.shape)
        _check_labels(labels, logits, task, None)
        tally.add(logits, labels)
    return _row(f"{task} alone", {task: tally})


def measure_tokens(
    zipped: ZippedModel, tokens: Mapping[str, Any], masks: Mapping[str, Any] | None = None, *,
    batch_size: int = BATCH, progress: bool = True,
) -> Accuracy:  # fmt: skip
    """Perplexity and accuracy of the next token of a merged causal language model, each head on its own task.

    Its parents are measured on the same by `measure_one` with a `TokenBatches`.

    Args:
        zipped: The network; its heads give logits (batch, length, vocabulary), of the next token at each place.
        tokens: By task: token ids (n, length), of the length that the network was traced with.
        masks: By task: (n, length), 1 where a token counts and 0 where it is padding. A token is told where its own
            mask is 1; masks go into the network where it takes ``attention_mask``.
        batch_size: Sequences in a batch.
        progress: Show bars.

    Raises:
        CalibrationError: The length is another, an id is not in the vocabulary, arrays have other shapes or types, or
            the network is no language model.
        OptionError: There is no such task.
    """
    unknown = sorted(set(masks or ()) - set(tokens))
    if unknown:
        raise CalibrationError(f"there is a mask of {unknown[0]!r}, and tokens of {', '.join(tokens)} only")
    loaders = {
        task: TokenBatches(zipped, task, ids, (masks or {}).get(task), batch_size=batch_size)
        for task, ids in tokens.items()
    }
    return measure(zipped, loaders, progress=progress)


def table(rows: Sequence[Accuracy], tasks: Sequence[str]) -> str:
    """The rows as a table of plain text; of language models there are two."""
    texts = any(row.perplexity for row in rows)
    counts = [f"{rows[0].measured[task]:,}" for task in tasks]
    percents = {
        row.name: (
            *(row.tasks.get(task) for task in tasks),
            row.average if len(row.tasks) == len(tasks) else None,
            *(() if texts else (row.joint,)),
        )
        for row in rows
    }
    if not texts:
        return _table("accuracy in %", (*tasks, "average", "joint"), percents, ("images", *counts), 1)
    perplexities = {row.name: [row.perplexity.get(task) for task in tasks] for row in rows}
    last = "tokens", *counts
    return _table("perplexity", tasks, perplexities, last, 2) + _table(
        "accuracy in %", (*tasks, "average"), percents, last, 1
    )


def _table(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], last: Sequence[str], digits: int
) -> str:
    """Numbers by network as a table, with a row of other things at the end."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fxzip.report import render

    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("network", *columns):
        shown.add_column(heading, justify="left" if heading == "network" else "right", overflow="fold")
    for name, values in rows.items():
        shown.add_row(name, *("-" if x is None else f"{x:,.{digits}f}" for x in values))
    shown.add_row(*last, *[""] * (1 + len(columns) - len(last)))
    return render(shown)


@dataclass
class _Tally:
    """What is counted of one head's answers.

    Attributes:
        right: Labels that have the largest logit.
        count: Labels.
        loss: The sum of their negative log likelihoods, in nats.
        places: Whether there is a label for each place of a sample.
    """

    right: int = 0
    count: int = 0
    loss: float = 0.0
    places: bool = False

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (*labels, classes).
            labels: Any shape; `LEFT_OUT` are left out.
        """
        self.places = labels.dim() > 1
        rows, wanted = logits.flatten(0, -2), labels.flatten()
        rows = rows if rows.dtype is torch.float64 else rows.float()
        self.right += int((rows.argmax(1) == wanted).sum())
        self.count += int((wanted != LEFT_OUT).sum())
        losses = F.cross_entropy(rows, wanted, ignore_index=LEFT_OUT, reduction="none")
        self.loss += float(losses.double().sum())

    @property
    def perplexity(self) -> float:
        """Of the mean loss; infinite where that is too large."""
        return float(torch.tensor(self.loss / self.count, dtype=torch.float64).exp())


def _row(name: str, tallies: Mapping[str, _Tally], joint: float | None = None) -> Accuracy:
    empty = next((task for task, tally in tallies.items() if not tally.count), None)
    if empty is not None:
        raise CalibrationError(f"{empty}: the loader gave no labels to measure")
    return Accuracy(
        name,
        {task: 100 * tally.right / tally.count for task, tally in tallies.items()},
        {task: tally.count for task, tally in tallies.items()},
        joint,
        {task: tally.perplexity for task, tally in tallies.items() if tally.places},
    )


def _batches(model: nn.Module, loader: Batches, text: str, progress: bool) -> Iterator[tuple[int, Inputs, Tensor]]:
    """A loader's batches where a network is: number, inputs and labels; the network is in eval mode meanwhile."""
    device = device_of(model)
    with evaluating(model), counted(len(loader), progress, f"measuring {text}") as step:
        for number, (inputs, labels) in enumerate(loader):
            yield number, to_device(*model_inputs(inputs), device), labels if device is None else labels.to(device)
            step()


def _answer(model: Callable[..., Any], number: int, inputs: Inputs) -> Any:
    with torch.no_grad():
        return run(model, number, *inputs)


def _check_labels(labels: Tensor, logits: Tensor, task: str, classes: Sequence[str] | None) -> None:
    size = logits.shape[-1]
    if classes is not None and len(classes) != size:
        raise CalibrationError(
            f"{task}: the images are in folders of {len(classes)} classes ({', '.join(classes[:4])}...), and the head "
            f"has {size}; give every class a folder, even one without images"
        )
    known = labels if labels.dim() == 1 else labels[labels != LEFT_OUT]
    if known.numel() and (int(known.max()) >= size or int(known.min()) < 0):
        raise CalibrationError(f"{task}: a label is {int(known.max())}, and the head has {size} classes from 0 on")
