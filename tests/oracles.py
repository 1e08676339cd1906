"""The exact oracles of the analysis and the merge, on networks with random weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fxzip
from fxzip.channels import ChannelSpec, Site
from fxzip.passes.permute import permute, random_permutations

TOLERANCE = 1e-9
"""Largest difference allowed, as a share of the output's standard deviation, in float64."""


def images(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images that differ in contrast, brightness and texture, so that few channels are dead on them."""
    g = Generator().manual_seed(seed)
    noise = torch.randn(count, channels, size, size, generator=g, dtype=torch.float64)
    smooth = nn.functional.avg_pool2d(noise, 5, 1, 2)
    mix = torch.rand(count, 1, 1, 1, generator=g, dtype=torch.float64)
    tint = torch.randn(count, channels, 1, 1, generator=g, dtype=torch.float64)
    return noise * mix + 5 * smooth * (1 - mix) + tint


def randomise(model: nn.Module, x: Any, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value that keeps the network alive; float64, eval mode.

    Weights keep their initial scale. Vectors (gammas, layer scales: the default of 1e-6 hides errors) are drawn
    around one, biases around zero, and each layer's bias is set so that its channels are not all negative.
    """
    g = Generator().manual_seed(seed)
    model = model.double().eval()

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=tensor.dtype) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                draw(parameter, *((-0.3, 0.3) if name.endswith(("bias", "beta")) else (0.7, 1.3)))
            elif not bool(parameter.any()):
                draw(parameter, -0.1, 0.1)
        _settle(model, x)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_var is not None:
                module.running_var.mul_(torch.rand(module.running_var.shape, generator=g, dtype=torch.float64) + 0.5)
    return model


def _settle(model: nn.Module, x: Any) -> None:
    """One pass that sets BatchNorm statistics, and biases of layers without a norm, to what the data give."""
    handles = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            handles.append(module.register_forward_hook(_centre))
    call(model, x)
    for handle in handles:
        handle.remove()
    model.eval()


def _centre(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1
    mean = output.mean([a for a in range(output.dim()) if a != axis])
    shift = module.bias * output.std() - mean
    module.bias.add_(shift)
    return output + shift.reshape([-1 if a == axis else 1 for a in range(output.dim())])


def call(model: nn.Module, x: Any) -> Any:
    """Run a model on an input, without gradients."""
    with torch.no_grad():
        return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def leaves(value: Any) -> list[Tensor]:
    """All tensors of an output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def difference(expected: Any, actual: Any) -> float:
    """The largest difference of two outputs, as a share of the expected one's standard deviation."""
    pairs = list(zip(leaves(expected), leaves(actual), strict=True))
    assert pairs, "no tensors to compare"
    return max(float((a - b).abs().max() / a.double().std().clamp(min=1e-12)) for a, b in pairs)


def permutation_error(model: nn.Module, x: Any, spec: ChannelSpec, seed: int = 1) -> float:
    """Oracle 1: permute all spaces at once."""
    return difference(call(model, x), call(spec.permute(model, Generator().manual_seed(seed)), x))


def mutations_missed(model: nn.Module, x: Any, spec: ChannelSpec, most: int = 10, seed: int = 0) -> list[Site]:
    """Oracle 2: leave out one site, of up to ``most`` drawn at random; those that oracle 1 does not notice."""
    expected = call(model, x)
    sites = [(i, j) for i, space in enumerate(spec.spaces) for j in range(len(space.sites)) if space.size > 1]
    chosen = torch.randperm(len(sites), generator=Generator().manual_seed(seed))[:most].tolist()
    missed = []
    for i, j in (sites[n] for n in chosen):
        space = spec.spaces[i]
        fewer = replace(space, sites=space.sites[:j] + space.sites[j + 1 :])
        spaces = (*spec.spaces[:i], fewer, *spec.spaces[i + 1 :])
        orders = _moving(spec, space.name, seed)
        changed = permute(replace(spec, spaces=spaces), model, orders)
        if difference(expected, call(changed, x)) < 1e-6:
            missed.append(space.sites[j])
    return missed


def _moving(spec: ChannelSpec, name: str, seed: int) -> dict[str, Tensor]:
    """Random permutations that move the channels of one space for certain."""
    for again in range(seed, seed + 100):
        orders = random_permutations(spec, Generator().manual_seed(again))
        if not torch.equal(orders[name], torch.arange(spec[name].size)):
            return orders
    raise AssertionError(f"the channels of {name} cannot move")


def self_zip_error(model: nn.Module, x: Tensor, spec: ChannelSpec, method: str, **options: Any) -> float:
    """Oracle 4: a full zip, by the paper's rule, of a network and a permuted copy is the network again."""
    copy = spec.permute(model, Generator().manual_seed(2))
    prepared = fxzip.prepare(model, copy, example_inputs=x[:2])
    prepared.observe([x], progress=False)
    zipped = prepared.convert(method=method, reset_batch_norm=False, progress=False, **options)
    expected = call(model, x)
    return max(difference(expected, out) for out in call(zipped, x))


def ensemble_error(models: list[nn.Module], x: Tensor) -> float:
    """Oracle 5: a zip with an empty trunk is the ensemble."""
    prepared = fxzip.prepare(*models, example_inputs=x[:2])
    prepared.observe([x], progress=False)
    zipped = prepared.convert(cut=0.0, method="zip", progress=False)
    assert not list(zipped.trunk.parameters())
    outputs = call(zipped, x)
    return max(difference(call(model, x), out) for model, out in zip(models, outputs, strict=True))


Make = Callable[[], nn.Module]
