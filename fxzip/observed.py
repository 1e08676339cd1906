"""What was observed of networks, as a file: moments, the images that were held back, and which networks they are of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxzip.checks import models_and_loader
from fxzip.data.bars import Shown
from fxzip.data.batches import Given, to_device
from fxzip.data.checks import ready_loader
from fxzip.data.held import MOST, HeldBack, count_images, size_of_batches
from fxzip.data.loops import device_of
from fxzip.data.stores import packed, read_store, unpacked, write_store
from fxzip.errors import FileFormatError, OptionError
from fxzip.fingerprint import fingerprint
from fxzip.moments import Moments
from fxzip.passes.observe import observe
from fxzip.passes.points import Points

if TYPE_CHECKING:
    from fxzip.prepared import Prepared

KIND, VERSION = "observed", 1


@dataclass(frozen=True, eq=False)
class Observed:
    """What `Prepared.observe` found.

    Attributes:
        names: The tasks.
        models: Fingerprints of the models.
        example: What they were traced with.
        points: As for `Prepared.observe`.
        moments: By space.
        held: The images that were held back.
        count: How many others were observed.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    example: Given
    points: str
    moments: Mapping[str, Moments]
    held: tuple[Given, ...]
    count: int

    def as_store(self) -> tuple[dict[str, Tensor], Any]:
        """Its tensors and plain values (`fxzip.data.stores`)."""
        tensors: dict[str, Tensor] = {}
        for name, seen in self.moments.items():
            tensors |= {f"mean.{name}": seen.mean, f"scatter.{name}": seen.scatter}
        values: dict[str, Any] = {"kind": KIND, "version": VERSION, "names": self.names, "models": self.models}
        values |= {"example": packed([self.example], tensors, "example"), "held": packed(self.held, tensors, "held")}
        values |= {"points": self.points, "count": self.count}
        values["counts"] = {name: seen.count for name, seen in self.moments.items()}
        return tensors, values

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], values: Any, path: object = "the folder to resume from") -> Observed:
        """From tensors and plain values.

        Raises:
            FileFormatError: They are of something else, or of a later version.
        """
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise FileFormatError(f"{path} does not hold what Prepared.save writes")
        if values.get("version") != VERSION:
            raise FileFormatError(f"{path} is of version {values.get('version')}; this fxzip reads {VERSION}")
        try:
            moments = {
                name: Moments(count, tensors[f"mean.{name}"], tensors[f"scatter.{name}"])
                for name, count in values["counts"].items()
            }
            (example,), held = unpacked(values["example"], tensors), unpacked(values["held"], tensors)
            names, models = tuple(values["names"]), tuple(values["models"])
            return cls(names, models, example, values["points"], moments, tuple(held), int(values["count"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is not whole: {error}") from error


def observe_networks(
    prepared: Prepared, loader: Any, points: Points, hold_back: bool, progress: Shown, device: torch.device | None
) -> Prepared:
    """As of `Prepared.observe`."""
    processes, modules = prepared.processes, prepared.alignment.modules
    processes.hush()
    loader = ready_loader(loader, prepared.names, modules, processes)
    journal = prepared.journal
    if (before := journal.read(KIND)) is not None:
        take_up(prepared, Observed.of(*before), loader)
        return prepared
    where = prepared.merge_points(points)
    held = HeldBack(loader, MOST if hold_back else 0, processes, size_of_batches(loader, processes))
    shared: Any = {"held": held, "processes": processes, "journal": journal, "stats_device": device}
    prepared.moments = observe(prepared.alignment, where, loader, progress=progress, **shared)
    prepared.points, prepared.loader, prepared.held, prepared.kind = where, loader, held.held, points
    counts = processes.numbers("images", held.given, count_images(held.held))
    prepared.observed, prepared.held_back = map(int, counts)
    if journal.folder is not None:
        journal.keep(KIND, *observed_of(prepared).as_store())
    return prepared


def observed_of(prepared: Prepared) -> Observed:
    """What was observed of prepared networks, by all processes."""
    held = [batch for own in prepared.processes.everywhere("images held back", prepared.held) for batch in own]
    models = tuple(fingerprint(module) for module in prepared.alignment.modules)
    example, moments = Given(*prepared.spec.example), prepared.moments
    return Observed(prepared.names, models, example, prepared.kind, moments, tuple(held), prepared.observed)


def save_observed(prepared: Prepared, path: Path) -> None:
    """As of `Prepared.save`; of several processes the first one writes."""
    found = observed_of(prepared)
    if prepared.processes.leads:
        write_store(path, *found.as_store())


def load_prepared(
    path: Path, models: tuple[Any, ...], loader: Any, verify: bool, labels: Mapping[str, Iterable[str]] | None,
    process_group: Any, linearise: bool,
) -> Prepared:  # fmt: skip
    """As of `Prepared.load`."""
    from fxzip.api import prepare

    given, loader = models_and_loader(models, loader)
    found = Observed.of(*read_store(path), path)
    args, kwargs = found.example
    prepared = prepare(
        *given, example_inputs=kwargs or args, names=found.names, verify=verify, labels=labels,
        process_group=process_group, linearise=linearise,
    )  # fmt: skip
    take_up(prepared, found, ready_loader(loader, prepared.names, prepared.alignment.modules, prepared.processes))
    return prepared


def take_up(prepared: Prepared, found: Observed, loader: Iterable[Any]) -> None:
    """Let prepared networks go on from what was observed before, of the same models.

    Args:
        prepared: The networks, which no images were run through.
        found: What was observed.
        loader: What `Prepared.convert` reads; it is ready.

    Raises:
        OptionError: The models are others.
    """
    modules, processes = prepared.alignment.modules, prepared.processes
    for number, (module, mark) in enumerate(zip(modules, found.models, strict=False)):
        if fingerprint(module) != mark:
            raise OptionError(f"model {number} ({prepared.names[number]}) has other weights than what was observed")
    points: Any = found.points
    where = prepared.merge_points(points)
    if len(found.models) != len(modules) or where.keys() != found.moments.keys():
        raise OptionError("the models have other channel spaces than what was observed: give those that were")
    device, own = device_of(modules[0]), found.held[processes.rank :: processes.count]
    prepared.held = [Given(*to_device(*batch, device)) for batch in own]
    prepared.points, prepared.loader, prepared.kind = where, loader, points
    prepared.moments, prepared.observed = dict(found.moments), found.count
    prepared.held_back = count_images(found.held)
