"""The exact oracles of the analysis and the merge, on networks with random weights, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, fx, nn
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

    Weights keep their initial scale. Vectors and constants (gammas, layer scales: the default of 1e-6 hides errors) are
    drawn around one, tables of zeros around zero, biases above zero, and each layer's bias is set so that its channels
    are not all negative.
    """
    g = Generator().manual_seed(seed)
    model = model.double().eval()

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=g, dtype=tensor.dtype) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                draw(parameter, *((0.5, 1.2) if name.endswith(("bias", "beta")) else (0.7, 1.3)))
            elif bool((parameter == parameter.flatten()[0]).all()):  # scales and tables as they begin
                draw(parameter, *((0.7, 1.3) if bool(parameter.any()) else (-0.1, 0.1)))
        _settle(model, x)
    return model


def _settle(model: nn.Module, x: Any) -> None:
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
    call(model, x)
    for handle in handles:
        handle.remove()
    model.eval()


def _centred(module: nn.Module, output: Tensor) -> Tensor:
    """Set a layer's bias, or its weights' signs, by its output; the output that it has then."""
    axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1
    others = [a for a in range(output.dim()) if a != axis]
    shape = [-1 if a == axis else 1 for a in range(output.dim())]
    if module.bias is None:
        sign = torch.where(output.mean(others) < 0, -1.0, 1.0).to(output)
        module.weight.mul_(sign.reshape([-1] + [1] * (module.weight.dim() - 1)))
        return output * sign.reshape(shape)
    shift = (0.2 + module.bias) * output.std(others) - output.mean(others)
    module.bias.add_(shift)
    return output + shift.reshape(shape)


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
    """Oracle 2: leave out one site, of up to ``most`` drawn at random; those that oracle 1 does not notice.

    A parameter that has no influence at all (a bias of keys, which the softmax cancels) cannot be noticed, and is
    not counted as missed.
    """
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
        if difference(expected, call(changed, x)) < TOLERANCE and _matters(model, x, space.sites[j], expected):
            missed.append(space.sites[j])
    return missed


def _matters(model: nn.Module, x: Any, site: Site, expected: Any) -> bool:
    """Whether the output depends on a parameter where a site lies: it is changed there, by much."""
    changed = copy.deepcopy(model)
    tensor = changed.state_dict(keep_vars=True)[site.parameter]
    with torch.no_grad():
        here = site.index.flatten().unique()
        part = tensor.index_select(site.axis, here)
        noise = torch.rand(part.shape, generator=Generator().manual_seed(0), dtype=part.dtype)
        tensor.index_copy_(site.axis, here, part * (0.5 + noise) + 0.5 * noise)
    return difference(expected, call(changed, x)) >= TOLERANCE


def _moving(spec: ChannelSpec, name: str, seed: int) -> dict[str, Tensor]:
    """Random permutations that move the channels of one space for certain."""
    for again in range(seed, seed + 100):
        orders = random_permutations(spec, Generator().manual_seed(again))
        if not torch.equal(orders[name], torch.arange(spec[name].size)):
            return orders
    raise AssertionError(f"the channels of {name} cannot move")


def self_zip_errors(model: nn.Module, x: Tensor, spec: ChannelSpec) -> dict[str, float]:
    """Oracles 4 and 5: what merges of a network with a permuted copy of itself compute.

    A full zip by the paper's rule is the network again, by ``permute`` and by ``zip``; a zip with an empty trunk is
    the ensemble.
    """
    moved = spec.permute(model, Generator().manual_seed(2))
    expected = call(model, x), call(moved, x)
    prepared = fxzip.prepare(model, moved, example_inputs=x[:2]).observe([x], progress=False)
    del moved  # copies of large models are scarce in memory
    found = {}
    options: dict[str, dict[str, Any]] = {
        "permute": {"method": "permute"},
        "zip": {"method": "zip", "beta": 0.0},
        "ensemble": {"cut": 0.0},
    }
    for name, chosen in options.items():
        if name == "ensemble":  # which needs no map, and twice the memory for weights
            prepared.moments.clear()
        zipped = prepared.convert(refit=False, reset_batch_norm=False, progress=False, **chosen)
        assert (name == "ensemble") is (not list(zipped.trunk.parameters()))
        outputs = call(zipped, x)
        found[name] = max(difference(a, b) for a, b in zip(expected, outputs, strict=True))
        del zipped
    return found


def recorded(module: fx.GraphModule, *args: Any) -> dict[str, Any]:
    """What each node of a graph gives, by name; copies, since a later node may write into it."""
    values: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n.name] = result.clone() if isinstance(result, Tensor) else result
            return result

    with torch.no_grad():
        Recorder(module).run(*args)
    return values
