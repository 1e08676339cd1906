"""Mergers for fine-tunes of one checkpoint, written from their papers: on weights, without any matching.

Each gives the weights of one trunk; classifiers stay each task's own. BatchNorm statistics are reset after all of them,
on the same images that fxzip sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

State = Mapping[str, Tensor]


def average(states: Sequence[State], base: State) -> dict[str, Tensor]:
    """The mean of the weights (model soups, arXiv 2203.05482)."""
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in base}


def task_arithmetic(states: Sequence[State], base: State, scale: float = 0.4) -> dict[str, Tensor]:
    """The checkpoint, and the sum of the differences to it times a scale (arXiv 2212.04089, section 2)."""
    return {
        name: weight + scale * torch.stack([state[name].double() - weight for state in states]).sum(0)
        for name, weight in base.items()
    }


def ties(states: Sequence[State], base: State, keep: float = 0.2) -> dict[str, Tensor]:
    """Differences trimmed to the largest, signs elected, the rest averaged (arXiv 2306.01708, section 4)."""
    names = [name for name, weight in base.items() if weight.is_floating_point() and "running" not in name]
    deltas = torch.stack(
        [torch.cat([(state[name] - base[name]).double().flatten() for name in names]) for state in states]
    )
    least = deltas.abs().kthvalue(round((1 - keep) * deltas.shape[1]), 1, keepdim=True)[0]
    trimmed = torch.where(deltas.abs() >= least, deltas, 0)
    agreeing = torch.where(trimmed.sign() == trimmed.sum(0).sign(), trimmed, 0)
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    parts = merged.split([base[name].numel() for name in names])
    found = average(states, base)
    return {**found, **{name: base[name] + part.view_as(base[name]) for name, part in zip(names, parts, strict=True)}}


@torch.no_grad()
def regmean(models: Sequence[nn.Module], images: Sequence[Tensor], shrink: float = 0.9) -> dict[str, Tensor]:
    """Each layer's least squares of all models' outputs on their own inputs (arXiv 2212.09849, equation 2).

    Args:
        models: The networks; their linear layers and dense convolutions are solved for, all else is averaged.
        images: What the Gram matrices are taken of.
        shrink: What entries off the diagonal are multiplied by (section 3.2 of the paper).
    """
    states = [model.state_dict() for model in models]
    shared = {key: value for key, value in states[0].items() if all(s[key].shape == value.shape for s in states)}
    found = average(states, shared)
    grams = [_grams(model, images, shrink) for model in models]
    for name in grams[0]:
        if f"{name}.weight" not in shared:
            continue  # the classifiers of tasks with other classes
        weights = [state[f"{name}.weight"].double().flatten(1) for state in states]
        total = sum(gram[name] for gram in grams)
        products = sum(gram[name] @ weight.T for gram, weight in zip(grams, weights, strict=True))
        solved = torch.linalg.lstsq(total, products).solution.T  # type: ignore[arg-type]
        found[f"{name}.weight"] = solved.reshape(states[0][f"{name}.weight"].shape)
    return found


def _grams(model: nn.Module, images: Sequence[Tensor], shrink: float) -> dict[str, Tensor]:
    """The Gram matrix of the inputs of each layer of a network."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            if isinstance(layer, nn.Conv2d):
                columns = F.unfold(given[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
                rows = columns.transpose(1, 2).flatten(0, 1)
            else:
                rows = given[0].flatten(0, -2)
            found[name] = found.get(name, torch.zeros(())) + (rows.T @ rows).double()

        return add

    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    for batch in images:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: shrink * gram + (1 - shrink) * torch.diag(gram.diagonal()) for name, gram in found.items()}


def as_models(models: Sequence[nn.Module], merged: State, images: Sequence[Tensor], classifier: str) -> list[nn.Module]:
    """A network for each task: the merged weights, statistics reset, its own classifier."""
    found = []
    for model in models:
        own = copy.deepcopy(model)
        weights = {name: value for name, value in merged.items() if not name.startswith(classifier)}
        own.load_state_dict(weights, strict=False)
        update_bn(images, own)
        found.append(own.eval())
    return found
