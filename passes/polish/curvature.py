"""The curvature of the outputs' error in a network's parameters, and the step of Gauss and Newton that it asks for.

With J the outputs by the parameters, an error with gradient e and curvature H in the outputs (`Distance`) has the
gradient Jᵀe and the curvature JᵀHJ in the parameters, but for what J itself changes (Gauss and Newton's). Of a layer's
weights (o × d) that is taken for a Kronecker product: the mean of x xᵀ of the layer's inputs, and the sum of g gᵀ, with
g the gradients of random probes of the outputs by what the layer gives (K-FAC; Martens and Grosse, arXiv 1503.05671).
Of all other parameters (embeddings, norms) it is the diagonal, by the same probes: as images are probed independently,
the square of a sum over images is in the mean the sum of the squares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from fxzip.passes.polish.goal import Goal
from fxzip.passes.polish.network import Layer, Network
from fxzip.passes.refit.sums import precise

SAMPLES = 28
"""Positions that a layer's inputs are sampled at, for each of its inputs; `fxzip.passes.refit.sums` takes as many."""


@dataclass(eq=False)
class Factors:
    """The two factors of one layer's curvature.

    Attributes:
        inputs: Σ x xᵀ over the samples (groups, d, d).
        outputs: Σ g gᵀ over all positions (groups, o, o).
        count: How many samples there are of the inputs.
    """

    inputs: Tensor
    outputs: Tensor
    count: int = 0

    def damped(self, damping: float) -> tuple[Tensor, Tensor]:
        """Both, float64, the first as a mean; √damping of its mean diagonal is added to each."""
        found = []
        for factor in (self.outputs, self.inputs / max(self.count, 1)):
            own = factor.double()
            mean = own.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
            added = damping**0.5 * mean + torch.finfo(torch.float32).tiny
            found.append(own + added * torch.eye(own.shape[1], dtype=own.dtype, device=own.device))
        return found[0], found[1]

    def solved(self, gradient: Tensor, damping: float) -> Tensor:
        """The step (groups, o, d) that a gradient asks for."""
        outputs, inputs = self.damped(damping)
        found: Tensor = -torch.linalg.solve(inputs, torch.linalg.solve(outputs, gradient.double()).mT).mT
        return found


@dataclass(eq=False)
class Curvature:
    """Sums over images.

    Attributes:
        network: The network.
        gradient: The gradient of the error, for each of `parameters`.
        layers: The curvature of each layer.
        others: That of each of the other parameters, of its shape.
        error: The error.
    """

    network: Network
    gradient: list[Tensor]
    layers: list[Factors] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)
    error: float = 0.0

    @classmethod
    def of(cls, network: Network, goal: Goal, places: Iterable[int], generator: Generator) -> Curvature:
        """Gradient and curvature over some of a goal's images."""
        found = cls(network, [torch.zeros_like(precise(p)) for p in parameters(network)])
        found.others = [torch.zeros_like(precise(p)) for p in network.others]
        chosen = list(places)
        for place in chosen:
            found._add(goal, place, len(chosen), generator)
        return found

    def _add(self, goal: Goal, place: int, parts: int, generator: Generator) -> None:
        with torch.enable_grad():
            outputs, seen = self.network.watched(goal.images[place])
        self.error += goal.error(place, outputs)
        answered = [each for each in goal.answered(place, outputs) if each.has.requires_grad]
        if not answered:
            return
        given, values = [each.has for each in answered], [y for _, y in seen]
        errors = [each.distance.gradient(each.wanted, each.has) for each in answered]
        probes = [each.distance.probe(each.has, generator) for each in answered]
        wanted = parameters(self.network)
        gradients = torch.autograd.grad(given, wanted, errors, retain_graph=True, allow_unused=True)
        for total, gradient in zip(self.gradient, gradients, strict=True):
            if gradient is not None:
                total += gradient
        probed = torch.autograd.grad(given, [*values, *self.network.others], probes, allow_unused=True)
        self._add_layers([x for x, _ in seen], probed[: len(values)], parts, generator)
        for square, gradient in zip(self.others, probed[len(values) :], strict=True):
            if gradient is not None:
                square += precise(gradient).square()

    def _add_layers(
        self, inputs: list[Tensor], gradients: tuple[Tensor | None, ...], parts: int, generator: Generator
    ) -> None:
        for number, (layer, x, gradient) in enumerate(zip(self.network.layers, inputs, gradients, strict=True)):
            rows = None if gradient is None else precise(layer.contraction.rows(gradient))
            here = None if rows is None else _drawn(layer, rows, parts, generator)
            columns = layer.columns(precise(x.detach()), here)
            if len(self.layers) == number:
                width = layer.packed([p.detach() for p in layer.parameters]).shape
                zeros = columns.new_zeros
                self.layers.append(Factors(zeros(width[0], width[2], width[2]), zeros(width[0], width[1], width[1])))
            found = self.layers[number]
            found.inputs += columns @ columns.mT
            found.count += columns.shape[2]
            if rows is not None:
                found.outputs += rows @ rows.mT

    def steps(self, damping: float) -> list[list[Tensor]]:
        """The step of the layers, and that of the other parameters; each with a tensor for each of `parameters`."""
        size, first = [len(layer.parameters) for layer in self.network.layers], []
        parts = self.gradient[: sum(size)]
        for layer, factors, count in zip(self.network.layers, self.layers, size, strict=True):
            own, parts = parts[:count], parts[count:]
            first += layer.unpacked(factors.solved(layer.packed(own), damping).to(own[0]))
        second = []
        for gradient, square in zip(self.gradient[sum(size) :], self.others, strict=True):
            added = damping**0.5 * square.mean() + torch.finfo(torch.float32).tiny
            second.append(-gradient / (square + added))
        still = [torch.zeros_like(step) for step in first]
        return [[*first, *map(torch.zeros_like, second)], [*still, *second]]


def parameters(network: Network) -> list[Tensor]:
    """All parameters that are polished: those of the layers, then the others."""
    return [*(p for layer in network.layers for p in layer.parameters), *network.others]


def _drawn(layer: Layer, rows: Tensor, parts: int, generator: Generator) -> Tensor | None:
    """Some of a part's positions, drawn at random; None for all, where they are not too many."""
    width = layer.packed([p.detach() for p in layer.parameters]).shape[2]
    share, count = -(-SAMPLES * width // parts), rows.shape[2]
    return None if count <= share else torch.randperm(count, generator=generator)[:share].to(rows.device)
