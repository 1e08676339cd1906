"""Networks with random values, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxzip.testing.outputs import call, in_type


def images(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images that differ in contrast, brightness and texture, so that few channels are dead on them.

    Args:
        count: How many.
        size: Of their side.
        channels: Of each.
        seed: Of the noise.

    Returns:
        float64 of shape (count, channels, size, size).
    """
    g = Generator().manual_seed(seed)
    noise = torch.randn(count, channels, size, size, generator=g, dtype=torch.float64)
    smooth = nn.functional.avg_pool2d(noise, 5, 1, 2)
    mix = torch.rand(count, 1, 1, 1, generator=g, dtype=torch.float64)
    tint = torch.randn(count, channels, 1, 1, generator=g, dtype=torch.float64)
    return noise * mix + 5 * smooth * (1 - mix) + tint


def randomise(model: nn.Module, inputs: Any, seed: int = 0) -> nn.Module:
    """A copy in float64 and eval mode whose parameters and statistics have random values that keep it alive.

    Weights keep their initial scale. Vectors and constants (gammas, layer scales) are drawn around one, tables of zeros
    around zero, biases above zero, and each layer's bias is set so that its channels are not all negative on the
    inputs. BatchNorm statistics are those of the inputs.

    Args:
        model: A network as it begins; it is left as it is.
        inputs: As of `permutation_error`, in float64 where they are not integers.
        seed: Of the values.

    Returns:
        The copy.
    """
    g = Generator().manual_seed(seed)
    model = copy.deepcopy(model).double().eval()

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=tensor.dtype) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                draw(parameter, *((0.5, 1.2) if name.endswith(("bias", "beta")) else (0.7, 1.3)))
            elif bool((parameter == parameter.flatten()[0]).all()):  # scales and tables as they begin
                draw(parameter, *((0.7, 1.3) if bool(parameter.any()) else (-0.1, 0.1)))
        _settle(model, in_type(inputs, torch.float64))
    return model


def _settle(model: nn.Module, inputs: Any) -> None:
    """One pass that sets BatchNorm statistics, and biases of layers so that their outputs are mostly positive.

    Where a layer has no bias, the weights of channels that are mostly negative change their sign.
    """
    handles: list[Any] = []
    seen: set[nn.Module] = set()

    def once(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module in seen:  # used again: what was set stands
            return output
        seen.add(module)
        return _centred(module, output)

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(once))
    call(model, inputs)
    for handle in handles:
        handle.remove()
    model.eval()


def _centred(module: Any, output: Tensor) -> Tensor:
    """Set a layer's bias, or its weights' signs, by its output; the output that it has then."""
    axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1
    others = [a for a in range(output.dim()) if a != axis]
    shape = [-1 if a == axis else 1 for a in range(output.dim())]
    if module.bias is None:
        sign = torch.where(output.mean(others) < 0, -1.0, 1.0).to(output)
        module.weight.mul_(sign.reshape([-1] + [1] * (module.weight.dim() - 1)))
        return output * sign.reshape(shape)
    shift: Tensor = (0.2 + module.bias) * output.std(others) - output.mean(others)
    module.bias.add_(shift)
    return output + shift.reshape(shape)
