"""Two small ResNets learn half of the digits each, and are merged: ``fxzip demo``.

It uses the public API only, so it is an example, too. Accuracies are of held-out digits, in percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.errors import FxzipError

if TYPE_CHECKING:
    from rich.table import Table

NAMES = ("low", "high")
CLASSES = 5
PAPER = ("average", "permute", "zip")
METHODS = {False: PAPER, True: (*PAPER, "select")}
"""By whether layers are refitted."""
CUTS = (None, "layer2")
EPOCHS = 10
BATCH = 64


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width_in, height, width) to half the size where the stride is 2."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A ResNet of three stages for grey 16×16 images."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = Block(widths[0], widths[0], 1)
        self.layer2 = Block(widths[0], widths[1], 2)
        self.layer3 = Block(widths[1], widths[2], 2)
        self.head = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 1, 16, 16) to logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Ensemble(nn.Module):
    """All models side by side: what a merge is measured against."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Give each model's logits."""
        return tuple(model(x) for model in self.models)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits: images (n, 1, 16, 16), of mean 0 and variance 1, and labels (n,)."""

    train: TensorDataset
    test: TensorDataset

    def task(self, index: int, split: TensorDataset) -> tuple[Tensor, Tensor]:
        """Give the images of one task's classes, and their labels counted from 0."""
        images, labels = split.tensors
        mine = labels // CLASSES == index
        return images[mine], labels[mine] % CLASSES


@dataclass(frozen=True)
class Row:
    """One network of the table; what it cannot answer is None.

    ``agrees`` is what needs no labels: how often a merge answers as its parents do (`fxzip.fidelity`), in percent.
    """

    name: str
    flops: int
    params: int
    joint: float | None
    tasks: tuple[float | None, float | None]
    average: float | None
    agrees: float | None = None


def load_digits() -> Digits:
    """Load the digits, split into 70 % to train on and 30 % held out, the same in every run."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise FxzipError("the demo's digits come with scikit-learn: pip install 'fxzip[demo]'") from None
    pixels, target = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.as_tensor(target)
    train, test = model_selection.train_test_split(range(len(labels)), test_size=0.3, stratify=target, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]))


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar on stderr with the time that is left; gives a function to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task("training", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more threads, and lose tenfold where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    digits: Digits, index: int, seed: int, epochs: int = EPOCHS, step: Callable[[str], None] | None = None
) -> DigitNet:
    """Train a network on one task; ``step(text)`` is called after each epoch.

    The caller's random state is left as it was.
    """
    images, labels = digits.task(index, digits.train)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = DigitNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        steps = epochs * math.ceil(len(images) / BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            if step is not None:
                step(f"training {NAMES[index]}")
    return model.eval()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def measure(name: str, model: nn.Module, digits: Digits, only: int | None = None) -> Row:
    """Measure a network on the held-out digits; ``only`` is the one task of a network that has one head.

    FLOPs are of one image. Joint: which of all ten classes, by the largest of both heads' logits.
    """
    images, labels = digits.test.tensors
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    heads = (model(images),) if only is not None else model(images)
    tasks: list[float | None] = [None, None]
    for index, logits in zip((only,) if only is not None else (0, 1), heads, strict=True):
        mine = labels // CLASSES == index
        tasks[index] = _accuracy(logits[mine], labels[mine] % CLASSES)
    fidelity = model.report.fidelity if isinstance(model, fxzip.ZippedModel) else None
    agrees = None if fidelity is None or fidelity.agreement is None else 100 * fidelity.agreement
    return Row(
        name,
        counter.get_total_flops(),
        sum(parameter.numel() for parameter in model.parameters()),
        _accuracy(torch.cat(heads, 1), labels) if only is None else None,
        (tasks[0], tasks[1]),
        sum(x for x in tasks if x is not None) / 2 if only is None else None,
        agrees,
    )


@_one_thread()
def run(progress: bool = True, epochs: int = EPOCHS) -> list[Row]:
    """Train two networks, merge them in every way, and measure all of them."""
    digits = load_digits()
    with _progress(2 * epochs, progress) as step:
        models = [train(digits, index, seed=index + 1, epochs=epochs, step=step) for index in (0, 1)]
    rows = [measure(f"{NAMES[i]} alone", models[i], digits, only=i) for i in (0, 1)]

    prepared = fxzip.prepare(*models, example_inputs=digits.train.tensors[0][:2])
    prepared.observe(DataLoader(digits.train, batch_size=128), progress=progress)
    for refit in (False, True):
        for cut in CUTS:
            for method in METHODS[refit]:
                zipped = prepared.convert(cut=cut, method=method, refit=refit, progress=False)
                name = f"{method}{' + refit' if refit else ''}, {'full' if cut is None else f'to {cut}'}"
                rows.append(measure(name, zipped, digits))
    return [*rows, measure("ensemble", Ensemble(*models), digits)]


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Give the table as plain values."""
    return {"rows": [asdict(row) for row in rows]}


def table(rows: list[Row]) -> Table:
    """Give the table to print."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, title="Held-out digits: accuracy in %; FLOPs of one image")
    for heading in ("", "MFLOPs", "k params", "joint", "0-4", "5-9", "average", "agree"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        percents = ("-" if x is None else f"{x:.1f}" for x in (row.joint, *row.tasks, row.average, row.agrees))
        shown.add_row(row.name, f"{row.flops / 1e6:.2f}", f"{row.params / 1e3:.1f}", *percents)
    return shown
