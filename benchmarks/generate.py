"""Image-to-image networks: two small autoencoders of different images, merged (the paper's GANs, in small).

    python -m benchmarks.generate --data ../shared/data

One learned CIFAR-10's photographs, the other letters that are drawn here in any colours
(`benchmarks.lib.data.load_letters`), each from its own seed. Every output is an image, so a merge must keep all of it,
and not only which class it belongs to. Errors are of test images, whose values lie in [0, 1], and so are the outputs',
once cut off. Each merge's figures go to benchmarks/results/generate_SETTING.json as they come, so that a run can be
taken up again; what the docs show goes to benchmarks/results/generate.json and docs/pictures/generate.png.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import Split, load_cifar10, load_letters
from benchmarks.lib.merges import METHODS, in_order
from benchmarks.lib.mixed import Answer, Setting, Source, answers_of, begin, learn, measure, outputs, prepare
from benchmarks.lib.models import Autoencoder
from benchmarks.lib.runs import RESULTS, Row, write
from benchmarks.lib.tables import shown
from benchmarks.lib.training import reconstruction

if TYPE_CHECKING:
    from PIL import Image

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "generate.png"
SOURCES: dict[str, Callable[[Path, int], tuple[Split, Split]]] = {
    "CIFAR-10": lambda data, size: load_cifar10(data, size, standardise=False),
    "letters": lambda _, size: load_letters(size, standardise=False),
}
CUTS = {"full": None, "encoder only": "decoder"}
"""Of a full merge only the last convolution is left to the heads."""
NAMES = (
    "average", "permute", "ZipIt!", "zip, α = β = 1", "average + refit", "permute + refit", "select + refit",
    "zip + refit (default)",
)  # fmt: skip
DRAWN = ("average", "permute", "ZipIt!", "zip + refit (default)")
"""What the picture shows below the inputs and the networks' own outputs."""


def sources(setting: Setting, data: Path) -> dict[str, Source]:
    """Both data sets with their networks."""
    make = partial(Autoencoder, setting.width)
    return {
        name: learn(
            name, make, load(data, setting.size), setting, benchmark="generate", seed=seed, vary=flipped,
            loss_of=reconstruction,
        )
        for seed, (name, load) in enumerate(SOURCES.items())
    }  # fmt: skip


def flipped(images: Tensor) -> Tensor:
    """Half of the images mirrored."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


def error(answer: Answer, split: Split) -> float:
    """Mean squared error against the inputs."""
    return (outputs(answer, split).clamp(0, 1) - split.images).square().mean().item()


def decibels(mse: float) -> float:
    """The peak signal-to-noise ratio of images in [0, 1] with that error."""
    return -10 * math.log10(max(mse, 1e-10))


def summary(rows: Sequence[Row]) -> list[Row]:
    """The table of the docs: for each task the error and what it is in decibels."""
    lines = []
    for row in rows:
        line: Row = {"cut": row["cut"], "method": row["method"]}
        for name, mse in row["scores"].items():
            line |= {f"{name}, MSE": mse, f"{name}, PSNR in dB": round(decibels(mse), 1)}
        lines.append(line | {"FLOPs": round(row["flops"], 2), "merge_s": round(row["seconds"], 1)})
    return lines


def strips(chosen: Mapping[str, Source], images: int, each: int) -> dict[str, list[Tensor]]:
    """What the picture's rows show, by their names: for each task (each, 3, size, size)."""
    few = [source.test.first(each) for source in chosen.values()]
    own: list[Answer] = [source.network for source in chosen.values()]
    prepared = prepare(chosen, images)
    answers = {"own network": own}
    answers |= {name: answers_of(prepared.convert(progress=False, **METHODS[name])) for name in DRAWN}
    found = {"input": [split.images for split in few]}
    for name, heads in answers.items():
        found[name] = [outputs(head, split).clamp(0, 1) for head, split in zip(heads, few, strict=True)]
    return found


def picture(rows: Mapping[str, Sequence[Tensor]], titles: Sequence[str], scale: int = 2) -> Image.Image:
    """Rows of images with their names, the tasks side by side, dark on white."""
    from PIL import Image, ImageDraw, ImageFont

    count, size = len(next(iter(rows.values()))[0]), next(iter(rows.values()))[0].shape[-1] * scale
    left, top, gap = 190, 30, 4
    across = count * (size + gap) + 3 * gap
    sheet = Image.new("RGB", (left + len(titles) * across, top + len(rows) * (size + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for task, title in enumerate(titles):
        pen.text((left + task * across, top // 2), title, "black", font, anchor="lm")
    for row, (name, tasks) in enumerate(rows.items()):
        y = top + row * (size + gap)
        pen.text((left - 3 * gap, y + size // 2), name, "black", font, anchor="rm")
        for task, images in enumerate(tasks):
            for column, image in enumerate(images):
                pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
                tile = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + task * across + column * (size + gap), y))
    return sheet


def main() -> None:
    """Run what is missing, write it, draw, print all."""
    line = CommandLine(__doc__).training()
    options = line.numbers(width=16, size=32, steps=1500, images=1000, test=2000, columns=6, threads=1).read()
    setting, about, kept = begin("generate", "autoencoders", options)
    found = sources(setting, options.data)
    kept.extend(measure(found, setting.images, CUTS, NAMES, error, kept))
    lines = summary(in_order(kept.rows, CUTS, NAMES))
    write(RESULTS / "generate.json", {**about, "rows": lines})
    picture(strips(found, setting.images, options.columns), list(found)).save(PICTURE, optimize=True)
    Console(width=160).print(shown(lines, about["setting"]))


if __name__ == "__main__":
    main()
