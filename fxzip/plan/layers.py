"""The layers of torch.nn as the arguments that make them: read off a layer, checked, and made again.

What was changed after a layer was made is kept beside the arguments: plain settings under ``set``, the shapes of
parameters that were replaced under ``shapes``. Recurrent layers are made from their arguments only: their kernels
rely on settings and weights that fit together.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.errors import FileFormatError, SaveError
from fxzip.plan.values import decode, encode, words

_NAMES = words("""
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle
CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d
ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineSimilarity CrossMapLRN2d Dropout Dropout1d Dropout2d
Dropout3d ELU Embedding FeatureAlphaDropout Flatten Fold GELU GLU GRU GRUCell GroupNorm Hardshrink
Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d
LPPool3d LSTM LSTMCell LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d
MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d Mish PReLU  PixelShuffle
PixelUnshuffle RMSNorm RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d
ReplicationPad2d ReplicationPad3d SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign
SyncBatchNorm Tanh Tanhshrink Threshold Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d
ZeroPad1d ZeroPad2d ZeroPad3d
""")
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_INTERNAL = frozenset((*vars(nn.Module()), "training"))
_DEEPEST = 1024
"""The most layers in a recurrent one: each is made in Python, before its weights are looked for."""
_FIXED = (nn.RNNBase, nn.RNNCellBase)
"""Classes of which nothing can be changed."""
_MOST_AXES = 16


@functools.cache
def layer_classes() -> Mapping[str, type[nn.Module]]:
    """The classes that a saved network may have, by name: torch.nn's layers without parts."""
    found = {name: getattr(nn, name) for name in _NAMES}
    strange = [
        n for n, c in found.items() if not (isinstance(c, type) and c.__module__.startswith("torch.nn.modules."))
    ]
    assert not strange, strange
    return found


def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a class that say what it computes."""
    if kind is nn.LSTM:
        return (*_RECURRENT, "proj_size")
    if kind is nn.GRU:
        return _RECURRENT
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [p.name for p in inspect.signature(kind).parameters.values() if p.kind in named]
    return tuple(n for n in found if n not in ("device", "dtype") and not n.startswith("_"))


def write_layer(path: str, layer: nn.Module) -> dict[str, Any]:
    """A layer as its class and the arguments that make it again.

    Raises:
        SaveError: It is none of torch.nn's own, or it has been changed since it was made.
    """
    kind = type(layer)
    if layer_classes().get(kind.__name__) is not kind:
        raise SaveError(f"{path} is a {kind.__module__}.{kind.__qualname__}; only layers of torch.nn can be saved")
    values = {name: _value(layer, name) for name in _arguments(kind) if hasattr(layer, name)}
    defaults = {p.name: p.default for p in inspect.signature(kind).parameters.values()}
    values = {name: value for name, value in values.items() if not _same(value, defaults.get(name))}
    try:
        entry = {"class": kind.__name__, "config": {name: encode(value) for name, value in values.items()}}
        return {**entry, **_changes(layer, make_layer(entry))}
    except (SaveError, FileFormatError) as error:
        raise SaveError(f"{path} ({kind.__name__}) cannot be saved: {error}") from error


def _value(layer: nn.Module, name: str) -> Any:
    """An argument's value; of a parameter it says whether there is one (``bias=False``)."""
    if name in layer._parameters:
        return layer._parameters[name] is not None
    return getattr(layer, name)


def _changes(layer: nn.Module, again: nn.Module) -> dict[str, Any]:
    """What a layer has otherwise than the one that its arguments make.

    Raises:
        SaveError: It has what no setting and no shape says.
    """
    if "forward" in vars(layer):
        raise SaveError("its forward was replaced; write what it computes in the forward of the model")
    settings = {}
    for name in _settings(again):
        if name not in vars(layer) or not _is_plain(vars(layer)[name]):
            raise SaveError(f"its {name} was removed or replaced after it was made; make the layer anew")
        if vars(layer)[name] != vars(again)[name]:
            settings[name] = encode(vars(layer)[name])
    ours, others = (_state(module) for module in (layer, again))
    missing = [name for name in {**ours, **others} if (ours.get(name) is None) != (others.get(name) is None)]
    if missing or layer._non_persistent_buffers_set != again._non_persistent_buffers_set:
        raise SaveError(
            f"its tensors are not those of a new one ({', '.join(missing) or 'buffers'}): put what was added into a "
            "module of its own"
        )
    shapes = {name: list(shape) for name, shape in ours.items() if shape is not None and shape != others[name]}
    changed = {key: found for key, found in (("set", settings), ("shapes", shapes)) if found}
    if changed and isinstance(layer, _FIXED):
        raise SaveError(
            f"its {', '.join((*settings, *shapes))} changed after it was made: make a new layer of that size"
        )
    return changed


def _settings(layer: nn.Module) -> list[str]:
    """The names of a layer's plain attributes."""
    return [name for name, value in vars(layer).items() if name not in _INTERNAL and _is_plain(value)]


def _same(value: Any, default: Any) -> bool:
    """Whether a value goes without saying: older versions of torch do not know the newest arguments."""
    return type(value) is type(default) and bool(value == default)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _state(module: nn.Module) -> dict[str, tuple[int, ...] | None]:
    tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}


def make_layer(entry: Mapping[str, Any]) -> nn.Module:
    """The layer of a plan's entry, in eval mode, on the meta device: no memory, no random numbers.

    Raises:
        FileFormatError: The class is not listed, or does not take these arguments or changes.
    """
    name, config = entry.get("class"), entry.get("config")
    kind = layer_classes().get(name) if isinstance(name, str) else None
    if kind is None:
        raise FileFormatError(f"the class {name!r} is not a layer of torch.nn")
    if not isinstance(config, dict) or not set(config) <= set(_arguments(kind)):
        raise FileFormatError(f"{name} does not take the arguments {config!r}")
    values = {key: decode(value) for key, value in config.items()}
    count = values.get("num_layers", 1)
    if not isinstance(count, int) or count > _DEEPEST:
        raise FileFormatError(f"{name} has {count!r} layers, more than {_DEEPEST:,}")
    try:
        with torch.device("meta"):
            layer = kind(**values).eval()
    except Exception as error:
        raise FileFormatError(f"{name} cannot be made of {config!r}: {error}") from error
    _change(layer, entry)
    return layer


def _change(layer: nn.Module, entry: Mapping[str, Any]) -> None:
    """Set on a layer what was changed since it was made.

    Raises:
        FileFormatError: It has no such setting or parameter, or they cannot be so.
    """
    settings, shapes = entry.get("set", {}), entry.get("shapes", {})
    name = type(layer).__name__
    if not isinstance(settings, dict) or not isinstance(shapes, dict):
        raise FileFormatError(f"the changes to the {name} cannot be read")
    if (settings or shapes) and isinstance(layer, _FIXED):
        raise FileFormatError(f"a {name} cannot be changed")
    known = set(_settings(layer))
    for key, value in settings.items():
        plain = decode(value)
        if key not in known or not _is_plain(plain):
            raise FileFormatError(f"a {name} cannot have {key[:60]!r} set to {value!r}")
        setattr(layer, key, plain)
    for key, shape in shapes.items():
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        old = {**layer._parameters, **layer._buffers}.get(key)
        if old is None or not sizes or len(shape) > _MOST_AXES or math.prod(shape) >= 1 << 63:
            raise FileFormatError(f"a {name} cannot have a {key[:60]!r} of the shape {shape!r}")
        empty = torch.empty(shape, dtype=old.dtype, device="meta")
        setattr(layer, key, nn.Parameter(empty) if key in layer._parameters else empty)
