"""Models by name: architectures of timm and torchvision with the user's own weights.

model = fxzip.zoo.load("timm:resnet50", "dogs.safetensors")
config = fxzip.zoo.data_config(model)
transform = fxzip.zoo.transform(config)  # from a PIL image to the tensor that the model takes
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.checkpoints import State, load_state, read_checkpoint
from fxzip.errors import CheckpointError, OptionError
from fxzip.model_names import LIBRARIES, unknown_model

SOURCES = ("local-dir", "hf-hub")
_PROBED = (2, 3)  # class counts; where the shapes of two models differ is the classifier


def load(
    name: str | None,
    checkpoint: str | PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    ema: bool = True,
    **model_args: Any,
) -> nn.Module:
    """A model by its name, in eval mode, with the weights of a checkpoint.

        fxzip.zoo.load("timm:resnet50", "dogs.safetensors")
        fxzip.zoo.load("torchvision:resnet50", "birds.pth")
        fxzip.zoo.load("hf-hub:timm/resnet18.a1_in1k")
        fxzip.zoo.load(None, "local-dir:dogs/")  # a folder with config.json, as timm saves it

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, or a model with its weights: ``local-dir:FOLDER``, ``hf-hub:REPO``
            (through timm). None: the checkpoint is one of these two.
        checkpoint: A .safetensors or .pth file (see `fxzip.checkpoints`), ``local-dir:FOLDER``, ``hf-hub:REPO``, or a
            folder with a config.json. None: the weights that belong to the name, or random ones.
        num_classes: Number of classes; default: the checkpoint's.
        ema: Prefer averaged weights where the checkpoint has both.
        **model_args: Further arguments of the architecture (``img_size=32``, ``in_chans=1``).

    Raises:
        OptionError: The name is unknown (near ones are named), or an argument does not suit it.
        CheckpointError: The checkpoint is missing, cannot be read, or is of another architecture.
    """
    given = None if checkpoint is None else fspath(checkpoint)
    if given is not None and _folder_with_config(given):
        given = f"local-dir:{given}"
    if given is not None and _source(given) in SOURCES:
        return _load_with_config(name, given, num_classes, model_args)
    if name is None:
        raise OptionError(f"no model name for {given}: give one like timm:resnet50")
    if _source(name) in SOURCES:
        model = _build(name, num_classes, model_args, weights=given is None)
        if given is not None:
            load_state(model, read_checkpoint(given, model.state_dict(), ema=ema), source=given, name=name)
        return model.eval()
    _check_name(name)
    if given is None:
        return _build(name, num_classes, model_args).eval()
    state = read_checkpoint(given, _build(name, None, model_args, meta=True).state_dict(), ema=ema)
    if num_classes is None:
        num_classes = _count_classes(name, state, model_args)
    model = _build(name, num_classes, model_args)
    load_state(model, state, source=given, name=name)
    return model.eval()


def data_config(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """How images are prepared for a model: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ...

    Args:
        model: What `load` gave (its ``pretrained_cfg`` is read, by timm's ``resolve_model_data_config``).
        **changes: Values to take instead; None: the model's own.

    Raises:
        OptionError: ``mean`` and ``std`` have not one value for each of the input's channels.
    """
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    config |= {key: value for key, value in changes.items() if value is not None}
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise OptionError(f"{key}={config[key]}: images of {channels} channels need {channels} values")
    return config


def transform(config: dict[str, Any]) -> Callable[[Any], Tensor]:
    """From a PIL image to the tensor (channels, height, width) that a model takes: timm's for evaluation."""
    from timm.data.transforms_factory import create_transform

    made: Callable[[Any], Tensor] = create_transform(**config, is_training=False)
    return made


# ---- names


def _source(name: str) -> str | None:
    """What stands before the colon, None without one."""
    source, colon, _ = name.partition(":")
    return source.replace("_", "-").lower() if colon else None


def _check_name(name: str) -> None:
    """Raise unless a library has a model of that name."""
    wrong = unknown_model(name, _models)
    if wrong is not None:
        raise OptionError(wrong)


def _models(library: str) -> Sequence[str]:
    if library == "timm":
        import timm

        return tuple(timm.list_models())
    import torchvision

    return tuple(torchvision.models.list_models())


def _folder_with_config(path: str) -> bool:
    return (Path(path) / "config.json").is_file()


# ---- building


def _build(
    name: str, num_classes: int | None, model_args: dict[str, Any], *, meta: bool = False, weights: bool = False
) -> nn.Module:
    """The architecture with random weights, or those of its source; ``meta``: without any where that can be."""
    source, _, rest = name.partition(":")
    make = _torchvision if source == "torchvision" else _timm
    given = model_args if num_classes is None else {**model_args, "num_classes": num_classes}
    named = rest if source in LIBRARIES else name
    if meta:
        with suppress(Exception), _quiet(), torch.device("meta"):
            return make(named, given, weights)  # a few architectures compute on the way: they are built in full
    try:
        with _quiet():
            return make(named, given, weights)
    except (TypeError, AssertionError) as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise OptionError(f"{name} cannot be built with {arguments or 'no arguments'}: {error}") from error
    except Exception as error:
        kind = CheckpointError if _source(name) in SOURCES else OptionError
        raise kind(f"{name} cannot be built: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about how random weights are drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _timm(name: str, given: dict[str, Any], weights: bool) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=weights, **given)
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    # timm's config is that of the weights it knows: the size and channels asked for come first.
    channels, *size = config.get("input_size", (3, 224, 224))
    asked = given.get("img_size")
    if asked is not None:
        size = [asked, asked] if isinstance(asked, int) else list(asked)
    channels = given.get("in_chans", channels)
    model.pretrained_cfg = {**config, "input_size": (channels, *size)}  # type: ignore[assignment]
    return model


def _torchvision(name: str, given: dict[str, Any], weights: bool) -> nn.Module:
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        given = {"weights_backbone": None, **given}  # which would be downloaded
    model: nn.Module = builder(weights=None, **given)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    model.pretrained_cfg = _preset_config(preset)  # type: ignore[assignment]
    return model


def _preset_config(preset: Any) -> dict[str, Any]:
    """How torchvision prepares images, as timm writes it; what the preset does not say is left out."""
    config: dict[str, Any] = {}
    crop = getattr(preset, "crop_size", None)
    resize = getattr(preset, "resize_size", None)
    if crop:
        config["input_size"] = (3, crop[-1], crop[-1])
        config["crop_mode"] = "center"
    if crop and resize:
        config["crop_pct"] = crop[-1] / resize[-1]
    for key in ("mean", "std"):
        if getattr(preset, key, None):
            config[key] = tuple(getattr(preset, key))
    if getattr(preset, "interpolation", None) is not None:
        config["interpolation"] = preset.interpolation.value
    return config


def _load_with_config(name: str | None, source: str, num_classes: int | None, model_args: dict[str, Any]) -> nn.Module:
    """A model that comes with its own config, which must be of the architecture that was asked for."""
    model = _build(source, num_classes, model_args, weights=True)
    own = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    if name is not None and name.partition(":")[2].partition(".")[0] not in ("", own) and _source(name) not in SOURCES:
        raise CheckpointError(f"{source} is of another architecture than {name}: timm:{own}")
    return model.eval()


def _count_classes(name: str, state: State, model_args: dict[str, Any]) -> int | None:
    """The number of classes that a state dict's classifier has; None where it cannot be told.

    Where two models of different class counts differ in shape, the classifier is.
    """
    if "num_classes" in model_args:
        return None
    try:
        two, three = (_build(name, count, model_args, meta=True).state_dict() for count in _PROBED)
    except OptionError:
        return None
    for key, value in two.items():
        for axis, (size, larger) in enumerate(zip(value.shape, three[key].shape, strict=True)):
            found = state.get(key)
            if size != larger and found is not None and found.ndim == value.ndim:
                return int(_PROBED[0] + (found.shape[axis] - size) // (larger - size))
    return None
