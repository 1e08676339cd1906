"""Networks of one architecture that learned different data sets: training them, merging them, measuring."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxzip
from benchmarks.lib.data import Split
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import METHODS, timed_merge
from benchmarks.lib.runs import CHECKPOINTS, RESULTS, Kept, Row
from benchmarks.lib.training import Loss, Vary, classification, train

Answer = Callable[[Tensor], Tensor]
BATCH = 128
SHARE = 25
"""Images of one data set in a batch of the calibration loaders: whatever reads a part reads of all."""


@dataclass(frozen=True)
class Setting:
    """What the rows depend on."""

    width: int
    size: int
    steps: int
    images: int
    test: int
    bf16: bool

    @classmethod
    def of(cls, options: Namespace) -> Setting:
        """From a command line that has an option for each."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    @property
    def trained(self) -> str:
        """What a checkpoint depends on, for its name."""
        return f"w{self.width}_s{self.size}_n{self.steps}{'_bf16' if self.bf16 else ''}"

    @property
    def key(self) -> str:
        """A name for files of results."""
        return f"{self.trained}_i{self.images}_t{self.test}"


@dataclass(frozen=True)
class Source:
    """A data set, and the network that was trained on it."""

    network: nn.Module
    train: Split
    test: Split


def begin(benchmark: str, networks: str, options: Namespace) -> tuple[Setting, Row, Kept]:
    """What a command starts with: its setting, what its results say of themselves, and the rows that there are."""
    setting, about = Setting.of(options), facts(benchmark, options.threads, "fxzip")
    about["setting"] = f"{networks} {setting.trained}, {setting.images} images, {setting.test} test images of each"
    kept = Kept(RESULTS / f"{benchmark}_{setting.key}.json", about, keys=("models", "cut", "method"))
    return setting, about, kept


def learn(
    name: str,
    make: Callable[[], nn.Module],
    splits: tuple[Split, Split],
    setting: Setting,
    *,
    benchmark: str,
    seed: int,
    vary: Vary,
    lr: float = 0.4,
    loss_of: Loss = classification,
) -> Source:
    """A data set and its network, which is trained where there is no checkpoint; all take the same number of steps."""
    split, test = splits
    network = train(
        make,
        split,
        seed=seed,
        epochs=max(1, round(setting.steps * BATCH / len(split.images))),
        batch=BATCH,
        lr=lr,
        bf16=setting.bf16,
        checkpoint=CHECKPOINTS / f"{benchmark}_{setting.trained}_{name}.pt",
        vary=vary,
        loss_of=loss_of,
        log=lambda text: print(f"{name}: {text}", flush=True),
    )
    return Source(network, split, test.first(setting.test))


def prepare(chosen: Mapping[str, Source], images: int) -> fxzip.Prepared:
    """The networks, observed on a loader for each data set, of an equal share of the images, drawn at random."""
    share = images // len(chosen)
    generator = torch.Generator().manual_seed(0)
    drawn = [s.train.images[torch.randperm(len(s.train.images), generator=generator)[:share]] for s in chosen.values()]
    prepared = fxzip.prepare(*(s.network for s in chosen.values()), example_inputs=drawn[0][:2])
    return prepared.observe([DataLoader(part, batch_size=SHARE) for part in drawn], progress=False)  # type: ignore[arg-type]


def measure(
    chosen: Mapping[str, Source],
    images: int,
    cuts: Mapping[str, str | None],
    names: Sequence[str],
    score: Callable[[Answer, Split], float],
    done: Kept,
) -> Iterator[Row]:
    """A row for the networks by themselves, and for each cut and method that is not done.

    Args:
        chosen: The data sets, by name.
        images: How many the merges see, in all.
        cuts: Where the heads begin, by what to call it.
        names: Of the methods in `benchmarks.lib.merges.METHODS`.
        score: How good the answers to a split's images are.
        done: The rows that there are, by ``models``, ``cut`` and ``method``.
    """
    group, sources = " + ".join(chosen), list(chosen.values())

    def row(cut: str, method: str, flops: float, seconds: float, answers: Sequence[Answer]) -> Row:
        found: Row = {"models": group, "cut": cut, "method": method, "flops": flops, "seconds": seconds}
        scores = [score(answer, source.test) for answer, source in zip(answers, sources, strict=True)]
        return found | {"scores": dict(zip(chosen, scores, strict=True)), "average": statistics.mean(scores)}

    if (group, "none", "ensemble") not in done:
        yield row("none", "ensemble", len(sources), 0.0, [source.network for source in sources])
    wanted = [(cut, name) for cut in cuts for name in names if (group, cut, name) not in done]
    if not wanted:
        return
    observing, _, prepared = timed(lambda: prepare(chosen, images))
    for cut, name in wanted:
        zipped, flops, seconds = timed_merge(prepared, cut=cuts[cut], **METHODS[name])
        yield row(cut, name, flops, seconds + observing, answers_of(zipped))


def answers_of(zipped: fxzip.ZippedModel) -> list[Answer]:
    """A function for each task: the trunk and its head."""
    return [lambda x, task=task: zipped(x, task=task) for task in zipped.names]  # type: ignore[misc]


@torch.no_grad()
def outputs(answer: Answer, split: Split) -> Tensor:
    """The answers to all images of a split."""
    return torch.cat([answer(images) for images in split.images.split(1000)])
