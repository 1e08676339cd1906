"""What travels with a merged network: how images are prepared, and the names of the classes. Data only, no code."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from fxzip.data.batches import Inputs
from fxzip.errors import FileFormatError, FxzipError, OptionError, PreparationWarning
from fxzip.origins import Origin, origin_of
from fxzip.plan.records import read_record, write_record

_LARGEST = 1 << 27
"""The most elements of a prepared image."""
_LONGEST = 1000
"""The most characters of a class's name."""
_INTERPOLATIONS = frozenset({"nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"})
_CROPS = frozenset({"center", "squash", "border"})


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a network's input; the names are timm's. What nobody has said is None.

    Attributes:
        input_size: Channels, height and width.
        mean: Subtracted from each channel of 0 to 1.
        std: What it is divided by then.
        interpolation: How it is resized.
        crop_pct: Share of the resized image's side that the crop keeps.
        crop_mode: How it is cropped.
    """

    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Preparation:
        """From a dict as timm has it; further keys are passed over."""
        found: Any = {each.name: config.get(each.name) for each in fields(cls)}
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        return cls(**found)

    @property
    def config(self) -> dict[str, Any]:
        """What is known, as `fxzip.zoo.transform` takes it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def differences(self, other: Preparation) -> list[str]:
        """What both know and have otherwise, in words."""
        pairs = [(each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        return [f"{name} {a} and {b}" for name, a, b in pairs if a is not None and b is not None and a != b]

    def problem(self) -> str | None:
        """What is wrong with it, in words; None if nothing is."""
        size = self.input_size
        if size is not None and (
            len(size) != 3 or min(size) < 1 or size[0] not in (1, 3) or math.prod(size) > _LARGEST
        ):
            return f"the input size {size!r} is not that of an image"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and not (len(values) in (1, 3) and all(map(math.isfinite, values))):
                return f"the {name} {values!r} is not one number for each channel"
        if self.std is not None and 0 in self.std:
            return "the std is 0"
        if self.interpolation is not None and self.interpolation not in _INTERPOLATIONS:
            return f"there is no interpolation {self.interpolation[:40]!r}"
        if self.crop_mode is not None and self.crop_mode not in _CROPS:
            return f"there is no crop mode {self.crop_mode[:40]!r}"
        if self.crop_pct is not None and not 0.2 <= self.crop_pct <= 2:
            return f"the crop share {self.crop_pct!r} is not from 0.2 to 2"
        return None


@dataclass(frozen=True)
class Information:
    """What is known of a merged network beside its weights.

    Attributes:
        preparation: How images are prepared for the trunk.
        labels: The names of the classes of each task, in the order of its outputs.
        folded: The tasks whose models had images normalised otherwise: that is folded into their first layers.
        origins: Where the networks came from that were merged, by the names of their tasks; also of those whose heads
            were left out, as the trunk is made of them.
    """

    preparation: Preparation = field(default_factory=Preparation)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def some(self, names: Iterable[str]) -> Information:
        """That of some tasks."""
        kept = set(names)
        labels = {name: labels for name, labels in self.labels.items() if name in kept}
        return replace(self, labels=labels, folded=tuple(name for name in self.folded if name in kept))

    def joined(self, name: str, tasks: Sequence[str] | None = None) -> Information:
        """That of one head that answers for all.

        Args:
            name: What it is called.
            tasks: Those whose classes it has in one list, in their order; None: all have the same classes.
        """
        lists = list(self.labels.values())[:1] if tasks is None else [self.labels.get(task, ()) for task in tasks]
        known = tuple(label for labels in lists for label in labels) if all(lists) else ()
        return replace(self, labels={name: known} if known else {}, folded=())

    def checked(self, names: Sequence[str]) -> Information:
        """Itself, if a network with these tasks may have it.

        Raises:
            FileFormatError: It may not.
        """
        wrongs = (self.preparation.problem(), *(origin.problem() for origin in self.origins.values()))
        wrong = next(filter(None, wrongs), None)
        unknown = sorted({*self.labels, *self.folded} - set(names))
        if wrong is None and unknown:
            wrong = f"it names {unknown[0][:40]!r}, which is no task"
        if wrong is None and any(len(label) > _LONGEST for labels in self.labels.values() for label in labels):
            wrong = f"a class's name has more than {_LONGEST:,} characters"
        if wrong is not None:
            raise FileFormatError(f"the information on images and models: {wrong}")
        return self


def gathered(
    models: Sequence[nn.Module], names: Sequence[str], labels: Mapping[str, Iterable[str]] | None, example: Inputs
) -> Information:
    """What some models say of themselves: timm's ``pretrained_cfg``, ``id2label`` of a Hugging Face config.

    Args:
        models: The models.
        names: Their tasks.
        labels: Names of classes by task, which come before the models' own.
        example: Inputs of the size that they are merged for.

    Raises:
        OptionError: ``labels`` has another task.
    """
    unknown = sorted(set(labels or ()) - set(names))
    if unknown:
        raise OptionError(f"labels has {unknown[0]!r}, and the tasks are {', '.join(names)}")
    known = [preparation_of(model) for model in models]
    for name, other in zip(names[1:], known[1:], strict=True):
        different = known[0].differences(other)
        if different:
            warnings.warn(
                f"images were prepared otherwise for {names[0]} than for {name} ({'; '.join(different)}): all tasks "
                f"get one input, prepared as for {names[0]}; fxzip.renormalise folds another mean and std into a model",
                PreparationWarning,
                stacklevel=4,
            )
    own = {name: labels_of(model) for name, model in zip(names, models, strict=True)}
    given = {name: tuple(map(str, values)) for name, values in (labels or {}).items()}
    found = {name: given.get(name) or own[name] for name in names}
    first = known[0] if _usable(known[0]) else Preparation()
    image = next((leaf for leaf in example[0] if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
    if image is not None and first.config:
        first = replace(first, input_size=tuple(image.shape[1:]))
    origins = {name: origin_of(model) for name, model in zip(names, models, strict=True)}
    return Information(
        first,
        {name: values for name, values in found.items() if values},
        origins={name: origin for name, origin in origins.items() if origin is not None},
    )


def _usable(preparation: Preparation) -> bool:
    """Whether what a model says of itself, in whatever form, can be kept."""
    try:
        return read_record(Preparation, write_record(preparation)) == preparation and preparation.problem() is None
    except (FxzipError, TypeError, ValueError):
        return False


def preparation_of(model: nn.Module) -> Preparation:
    """How images are prepared for a model, as far as it says so (timm's and `fxzip.zoo`'s do)."""
    config = getattr(model, "pretrained_cfg", None)
    if config is not None and not isinstance(config, Mapping):
        config = getattr(config, "__dict__", {})
    return Preparation.of(config or {})


def labels_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes, where it knows them."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("label_names"):
        return tuple(map(str, config["label_names"]))
    named = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(named, Mapping) and named:
        try:
            found = tuple(str(named[place]) for place in range(len(named)))
        except KeyError:
            return None
        return None if all(re.fullmatch(r"LABEL_\d+", name) for name in found) else found
    return None
