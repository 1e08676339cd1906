"""Images that models were trained on otherwise, and the names of their classes, for ``fxzip zip``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxzip.cli import options as shared
from fxzip.cli.errors import warn
from fxzip.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

_NORMALISATION = ("mean", "std")


def prepared_alike(
    models: Sequence[nn.Module], names: Sequence[str], given: Mapping[str, Any]
) -> tuple[list[nn.Module], dict[str, Any], list[str]]:
    """Models that take images prepared in one way.

    What the command line says holds for all. Where a model's own mean and std are others than the first one's, they are
    folded into its first layer; another size, interpolation or crop is warned of.

    Returns:
        The models, how images are prepared, and the tasks whose models were changed.

    Raises:
        OptionError: They cannot be folded.
    """
    from fxzip.renormalising import renormalise
    from fxzip.zoo import data_config

    said = {key: given[key] for key in shared.PREPARATION}
    configs = [data_config(model, **said) for model in models]
    chosen, found, folded = configs[0], list(models[:1]), []
    for name, model, config in zip(names[1:], models[1:], configs[1:], strict=True):
        different = [key for key in shared.PREPARATION if _plain(config[key]) != _plain(chosen[key])]
        others = [f"{key} {config[key]}" for key in different if key not in _NORMALISATION]
        if others:
            warn(
                f"images for {name} were prepared otherwise ({', '.join(others)}); they are prepared as for {names[0]}"
            )
        if set(different) & set(_NORMALISATION):
            try:
                model = renormalise(model, config["mean"], config["std"], chosen["mean"], chosen["std"])
            except OptionError as error:
                raise OptionError(
                    f"{name}: its images had mean {config['mean']}, std {config['std']}: {error}"
                ) from error
            own: Any = model.pretrained_cfg
            model.pretrained_cfg = {**own, **{key: chosen[key] for key in _NORMALISATION}}  # type: ignore[assignment]
            warn(f"images for {name} had another mean and std, which are folded into its first layer")
            folded.append(name)
        found.append(model)
    return found, chosen, folded


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def read_labels(given: Sequence[str] | None) -> dict[str, list[str]]:
    """The classes of ``TASK=FILE`` options: a name on each line.

    Raises:
        OptionError: An option has no file, or it cannot be read.
    """
    found = {}
    for text in given or ():
        task, equals, path = text.partition("=")
        if not equals:
            raise OptionError(f"--labels {text}: write TASK=FILE")
        try:
            found[task] = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--labels {text}: {path} cannot be read: {error}") from error
    return found


def labels_of_folders(zipped: Any, data: Path, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The names of the folders of each task's images, where there are as many as its head has outputs.

    ImageFolder numbers classes so: by the alphabetical order of their folders.

    Args:
        zipped: The merged network.
        data: The images.
        tasks: What was merged; one head may have the classes of all (`fxzip.joint`).
    """
    import torch

    from fxzip.data.groups import find_images
    from fxzip.errors import CalibrationError
    from fxzip.joint import NAME

    if not data.is_dir() or zipped.example is None:
        return {}
    try:
        groups = find_images(data, labelled=True)
    except CalibrationError:
        return {}
    with torch.no_grad():
        outputs = dict(zip(zipped.names, zipped(*zipped.example[0], **zipped.example[1]), strict=True))
    found = {name: groups[name].classes for name in zipped.names if name in groups}
    if zipped.names == (NAME,) and all(task in groups and groups[task].classes for task in tasks):
        found = {NAME: tuple(label for task in tasks for label in groups[task].classes or ())}
    return {
        name: classes
        for name, classes in found.items()
        if classes and isinstance(outputs[name], torch.Tensor) and outputs[name].shape[1:] == (len(classes),)
    }
