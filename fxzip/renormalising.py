"""Renormalise: a model that takes images prepared for another one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxzip.errors import OptionError
from fxzip.surroundings import undisturbed

_TOLERANCE = 1e-3
_HELP = "prepare the images of both tasks alike, or cut behind the first layers (start=...)"


@undisturbed
def renormalise(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], to_mean: Sequence[float], to_std: Sequence[float]
) -> nn.Module:
    """A copy of a model that takes images of another mean and standard deviation.

    The change is linear, so it is folded into the first convolution: x ↦ a x + c for each channel. It is exact but at
    borders that are padded with zeros, which stand for another colour then.

    Args:
        model: The model.
        mean: What is subtracted from its images.
        std: What they are divided by.
        to_mean: What is subtracted from the images that the copy takes.
        to_std: What these are divided by.

    Raises:
        OptionError: The model does not begin with a convolution that can hold it.
    """
    result = copy.deepcopy(model).eval()
    where = next((p for p in result.parameters()), torch.zeros(1))
    old, new = ((torch.tensor(m, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))
                for m, s in ((mean, std), (to_mean, to_std)))  # fmt: skip
    factor, shift = new[1] / old[1], (new[0] - old[0]) / old[1]
    image = torch.rand(2, len(mean), *_size(model)).to(where)
    with torch.no_grad():
        conv, norm = _first(result, image)
        changed = image * _laid(factor, image) + _laid(shift, image)
        expected = _replicating(model, result, conv, changed)
        _fold(conv, norm, factor, shift)
        found = _replicating(result, result, conv, image)
    gap = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(expected, found, strict=True))
    if not gap <= _TOLERANCE:
        raise OptionError(f"another mean and std cannot be folded into the first layer (off by {gap:.0e}): {_HELP}")
    return result.train(model.training)


def _size(model: nn.Module) -> tuple[int, int]:
    """The height and width of a model's images, as far as it says so."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    return (int(size[1]), int(size[2])) if size else (224, 224)


def _laid(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image).reshape(1, -1, 1, 1)


def _first(model: nn.Module, image: Tensor) -> tuple[nn.Conv2d, _BatchNorm | None]:
    """The convolution that takes the image, and the BatchNorm that takes what it gives.

    Raises:
        OptionError: There is none, or it has no bias and no BatchNorm behind it.
    """
    takes: list[nn.Conv2d] = []
    norms: list[_BatchNorm] = []
    given: list[Any] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d) and inputs and inputs[0] is image:
            takes.append(module)
            given.append(output)
        elif isinstance(module, _BatchNorm) and any(inputs[0] is output for output in given):
            norms.append(module)

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, (nn.Conv2d, _BatchNorm))]
    model(image)
    for handle in handles:
        handle.remove()
    if len(takes) != 1 or takes[0].groups != 1 or not isinstance(takes[0].weight, nn.Parameter):
        raise OptionError(f"the model does not begin with one convolution of the image: {_HELP}")
    norm = norms[0] if norms else None
    if takes[0].bias is None and (norm is None or norm.running_mean is None):
        raise OptionError(f"the first convolution has neither a bias nor a BatchNorm behind it: {_HELP}")
    return takes[0], norm


def _replicating(model: nn.Module, folded: nn.Module, conv: nn.Conv2d, image: Tensor) -> list[Tensor]:
    """A model's outputs with the first convolution padded by the image's own border, where the fold is exact."""
    from fxzip.exported import tensors_in

    name = next(name for name, module in folded.named_modules() if module is conv)
    trial = copy.deepcopy(model).eval()
    first = trial.get_submodule(name)
    assert isinstance(first, nn.Conv2d)
    first.padding_mode = "replicate"
    return tensors_in(trial(image))


def _fold(conv: nn.Conv2d, norm: _BatchNorm | None, factor: Tensor, shift: Tensor) -> None:
    weight = conv.weight.double()
    added = (weight * _laid(shift, weight)).sum((1, 2, 3))
    conv.weight.copy_(weight * _laid(factor, weight))
    if conv.bias is not None:
        conv.bias += added.to(conv.bias)
    else:
        assert norm is not None
        assert norm.running_mean is not None
        norm.running_mean -= added.to(norm.running_mean)
