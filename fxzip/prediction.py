"""Predict: the classes of an image by their names, from each task's head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxzip.data.loops import device_of, evaluating
from fxzip.errors import OptionError
from fxzip.scores import logits_in
from fxzip.surroundings import undisturbed

if TYPE_CHECKING:
    from PIL import Image

    from fxzip.merged import ZippedModel


@dataclass(frozen=True)
class Prediction:
    """One class of a task.

    Attributes:
        label: Its name; its number where the network knows no names.
        number: Its place among the task's outputs.
        score: Its probability, 0 to 1.
    """

    label: str
    number: int
    score: float


@undisturbed
def predict(
    zipped: ZippedModel,
    image: str | PathLike[str] | Image.Image | Tensor,
    *,
    task: str | Iterable[str] | None = None,
    top: int = 5,
) -> dict[str, tuple[Prediction, ...]]:
    """The likeliest classes of one image, for each task; see `ZippedModel.predict`.

    Raises:
        OptionError: As there.
    """
    names = zipped.names if task is None else [task] if isinstance(task, str) else list(task)
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise OptionError(f"top={top!r}: it must be a whole number, 1 or more")
    x = _input(zipped, image)
    with torch.no_grad(), evaluating(zipped):
        outputs = zipped(x, task=names)
    return {name: _best(zipped, name, output, top) for name, output in zip(names, outputs, strict=True)}


def _input(zipped: ZippedModel, image: Any) -> Tensor:
    """One image as a batch of the network's precision, where it is.

    Raises:
        OptionError: It cannot be read, or it is not known how it is prepared.
    """
    if isinstance(image, Tensor):
        x = image[None] if image.dim() == 3 else image
        if x.dim() != 4 or len(x) != 1:
            raise OptionError(f"a tensor of shape {list(image.shape)} is not one image: give (channels, height, width)")
    else:
        x = _prepared(zipped, image)[None]
    dtype = next((p.dtype for p in zipped.parameters() if p.is_floating_point()), x.dtype)
    return x.to(device_of(zipped), dtype)


def _prepared(zipped: ZippedModel, image: Any) -> Tensor:
    from PIL import Image

    from fxzip.data.images import in_bytes
    from fxzip.zoo import transform

    config = zipped.information.preparation.config
    lacking = [key for key in ("input_size", "mean", "std") if key not in config]
    if lacking:
        raise OptionError(
            f"how images are prepared is not known ({', '.join(lacking)}): set zipped.information, or give a tensor"
        )
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    if isinstance(image, Image.Image):
        return transform(config)(in_bytes(image).convert(mode))
    try:
        with Image.open(Path(image)) as opened:
            return transform(config)(in_bytes(opened).convert(mode))
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise OptionError(f"{image} cannot be read as an image: {' '.join(str(error).split())}") from error


def _best(zipped: ZippedModel, task: str, output: Any, top: int) -> tuple[Prediction, ...]:
    """The likeliest classes in the output of a head.

    Raises:
        OptionError: It has no classes.
    """
    scores = logits_in(output)
    if scores is None or scores.dim() != 2:
        raise OptionError(f"the output of {task} is not a score for each class, so there is nothing to name")
    chances = scores[0].double().softmax(0)
    labels = zipped.information.labels.get(task, ())
    names = labels if len(labels) == len(chances) else tuple(map(str, range(len(chances))))
    best = chances.topk(min(top, len(chances)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Prediction(names[number], number, score) for number, score in pairs)
