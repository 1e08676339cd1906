"""Linear maps as one thing: y = Σ weight · x, for products, convolutions and transposed convolutions.

Each is a product over some axes of the weight and of the input, side by side for each group. What a convolution
multiplies at a position is a window of its input; after `Window` has laid these out on axes of their own, it is
a product like the others. A transposed convolution is an ordinary one on an input with zeros between its elements,
with the kernel turned around (arXiv 1603.07285, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as gradients

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {
    1: gradients.conv1d_weight,
    2: gradients.conv2d_weight,
    3: gradients.conv3d_weight,
}


@dataclass(frozen=True)
class Window:
    """What a convolution sees at each position; each of the tuples has an entry for each dimension.

    Attributes:
        groups: Groups of channels.
        kernel: Its size.
        stride: Steps from position to position.
        dilation: Steps inside the kernel.
        padding: What is added before and behind the input; negative cuts off.
        mode: The padding mode, as `torch.nn.functional.pad` names it.
        spacing: How far apart the input's elements are put first, zeros between them.
    """

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"
    spacing: tuple[int, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The windows of a batch: (n, channels, *size) to (n, groups, channels / groups, *positions, *kernel).

        Without padding it is a view.
        """
        x = self._padded(x)
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])

    def products(self, x: Tensor, t: Tensor) -> Tensor:
        """Σ t xᵀ over all windows x and the outputs t that belong to them: (groups, outputs, inputs).

        As convolutions compute the gradient of their weights: the windows are not copied out.
        """
        shape = (t.shape[1], x.shape[1] // self.groups, *self.kernel)
        gradient = _WEIGHT_GRADIENTS[len(self.kernel)]
        found = gradient(
            self._padded(x), shape, t, stride=self.stride, padding=0, dilation=self.dilation, groups=self.groups
        )
        return found.reshape(self.groups, t.shape[1] // self.groups, -1)

    def _padded(self, x: Tensor) -> Tensor:
        x = self._spread(x)
        if any(part for pair in self.padding for part in pair):
            x = F.pad(x, [part for pair in reversed(self.padding) for part in pair], self.mode)
        return x

    def _spread(self, x: Tensor) -> Tensor:
        if all(step == 1 for step in self.spacing):
            return x
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spacing, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places: list[Any] = [slice(None, None, step) for step in self.spacing]
        spread[..., *places] = x
        return spread


@dataclass(frozen=True)
class Contraction:
    """A layer without its bias: groups of products of weights (outputs × inputs) with inputs.

    Attributes:
        shape: Of the weight.
        split: The same, with an axis for the groups of a convolution.
        groups: Axes of the split weight that are groups.
        outputs: Axes of it that are each group's outputs.
        inputs: Axes of it that are summed over.
        source: Axes of the input (as ``window`` gives it), from the end: those of the groups, then the inputs, as
            in the weight. All others are samples, in the order of the output's.
        channels: Axes of the output, from the end, that hold the groups and their outputs, in that order.
        window: What a convolution does first.
        flipped: Axes of the split weight that run backwards.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    groups: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    source: tuple[int, ...]
    channels: tuple[int, ...]
    window: Window | None = None
    flipped: tuple[int, ...] = ()

    @classmethod
    def convolution(cls, shape: Sequence[int], window: Window, transposed: bool = False) -> Contraction:
        """A convolution with a weight (out, in / groups, *kernel); (in, out / groups, *kernel) if transposed."""
        n = len(window.kernel)
        kernel = tuple(range(3, 3 + n))
        return cls(
            shape=tuple(shape),
            split=(window.groups, shape[0] // window.groups, *shape[1:]),
            groups=(0,),
            outputs=(2,) if transposed else (1,),
            inputs=(1 if transposed else 2, *kernel),
            source=(-2 - 2 * n, -1 - 2 * n, *range(-n, 0)),
            channels=(-1 - n,),
            window=window,
            flipped=kernel if transposed else (),
        )

    @classmethod
    def einsum(cls, shape: Sequence[int], input: str, weight: str, output: str) -> Contraction | None:
        """A product by the letters of its axes, as `torch.einsum` has them; axes without letters come first.

        None where it is not the product of a layer: an axis that is summed before, that comes twice, or samples
        in another order.
        """
        terms = (input, weight, output)
        if any(len(set(term)) < len(term) for term in terms):
            return None
        groups = [s for s in weight if s in input and s in output]
        outputs = [s for s in weight if s not in input and s in output]
        inputs = [s for s in weight if s in input and s not in output]
        rest = [[s for s in term if s not in weight] for term in (input, output)]
        if rest[0] != rest[1] or len(groups + outputs + inputs) < len(weight) or not inputs:
            return None

        def places(term: str, letters: Sequence[str]) -> tuple[int, ...]:
            return tuple(term.index(s) - len(term) for s in letters)

        return cls(
            shape=tuple(shape),
            split=tuple(shape),
            groups=places(weight, groups),
            outputs=places(weight, outputs),
            inputs=places(weight, inputs),
            source=places(input, groups + inputs),
            channels=places(output, groups + outputs),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The output's sizes along ``channels``."""
        found = [self.split[axis] for axis in self.groups + self.outputs]
        return tuple(found) if len(found) == len(self.channels) else (math.prod(found),)

    @cached_property
    def count(self) -> int:
        """The number of groups."""
        return math.prod(self.split[axis] for axis in self.groups)

    @cached_property
    def mixed(self) -> dict[int, int]:
        """Axes of the input, counted from the end, over which the weight sums, each with the weight's axis for it.

        A matrix applied to the input along the former can be applied to the weight along the latter instead. Axes of
        groups are left out, and those that a convolution moves its kernel along.
        """
        if self.window is None:
            return dict(zip(self.source[len(self.groups) :], self.inputs, strict=True))
        return {-1 - len(self.window.kernel): self.inputs[0] - 1} if self.count == 1 else {}

    def samples(self, output: Tensor) -> int:
        """How many samples there are in a value of the output, of whatever number of channels."""
        return output.numel() // math.prod(output.shape[axis] for axis in self.channels)

    def columns(self, x: Tensor, here: Tensor | None = None) -> Tensor:
        """The inputs (groups, d, samples) in a value of the input, or those samples that are in ``here``."""
        return _laid(x if self.window is None else self.window(x), self.source, self.count, here)

    def rows(self, y: Tensor, here: Tensor | None = None) -> Tensor:
        """The outputs (groups, o, samples) in a value of the output, or those samples that are in ``here``."""
        return _laid(y, self.channels, self.count, here)

    def products(self, x: Tensor, t: Tensor) -> Tensor:
        """Σ t xᵀ over all samples of a value of the input and one of the output: (groups, o, d)."""
        if self.window is None or x.is_cuda:  # cuDNN would round what it multiplies to TF32
            return self.rows(t) @ self.columns(x).mT
        return self.window.products(x, t)

    def total_input(self, x: Tensor) -> Tensor:
        """The sum of `columns` over all samples (groups, d)."""
        x = x if self.window is None else self.window(x.sum(0, keepdim=True))
        return _summed(x, self.source, self.count)

    def total_output(self, y: Tensor) -> Tensor:
        """The sum of `rows` over all samples (groups, o)."""
        return _summed(y, self.channels, self.count)

    def packed(self, weight: Tensor) -> Tensor:
        """A weight as (groups, o, d)."""
        order = self.groups + self.outputs + self.inputs
        moved = weight.reshape(self.split).flip(self.flipped).permute(order)
        return moved.reshape(self.count, math.prod(self.split[a] for a in self.outputs), -1)

    def unpacked(self, matrix: Tensor) -> Tensor:
        """The weight that `packed` gives a matrix of."""
        order = [axis % len(self.split) for axis in self.groups + self.outputs + self.inputs]
        moved = matrix.reshape([self.split[axis] for axis in order])
        back = [order.index(axis) for axis in range(len(order))]
        return moved.permute(back).flip(self.flipped).reshape(self.shape)

    def vector(self, tensor: Tensor) -> Tensor | None:
        """What broadcasts with the output as one value for each of its channels; None if samples differ."""
        depth = -min(self.channels)
        extra = tensor.dim() - depth
        tensor = tensor.reshape((1,) * -extra + tensor.shape) if extra < 0 else tensor
        sizes = dict(zip(self.channels, self.sizes, strict=True))
        wanted = [sizes.get(axis, 1) for axis in range(-tensor.dim(), 0)]
        if any(size not in (1, most) for size, most in zip(tensor.shape, wanted, strict=True)):
            return None
        return tensor.expand(wanted).permute(_in_front(tensor.dim(), self.channels)).reshape(-1)

    def broadcast(self, vector: Tensor) -> Tensor:
        """A value for each channel as a tensor that broadcasts with the output; `vector` undoes it."""
        depth = -min(self.channels)
        front = _in_front(depth, self.channels)
        laid = vector.reshape(self.sizes + (1,) * (depth - len(self.channels)))
        return laid.permute([front.index(axis) for axis in range(depth)])


def _in_front(dims: int, axes: Sequence[int]) -> list[int]:
    """All axes in order, these (counted from the end) first."""
    first = [axis % dims for axis in axes]
    return [*first, *(axis for axis in range(dims) if axis not in first)]


def _laid(tensor: Tensor, axes: Sequence[int], groups: int, here: Tensor | None) -> Tensor:
    """The values of a tensor as (groups, those of ``axes``, all others)."""
    order = _in_front(tensor.dim(), axes)
    if here is None:
        front = [tensor.shape[axis] for axis in order[: len(axes)]]
        return tensor.permute(order).reshape(groups, math.prod(front) // groups, -1)
    samples = order[len(axes) :]
    places = torch.unravel_index(here, [tensor.shape[axis] for axis in samples])
    picked = tensor.permute([*samples, *order[: len(axes)]])[places]
    return picked.reshape(len(here), groups, -1).permute(1, 2, 0)


def _summed(tensor: Tensor, axes: Sequence[int], groups: int) -> Tensor:
    """The sum over all axes but these, as (groups, those of ``axes``)."""
    order = _in_front(tensor.dim(), axes)
    kept, others = order[: len(axes)], order[len(axes) :]
    total = tensor.sum(others) if others else tensor
    ranks = sorted(kept)
    return total.permute([ranks.index(axis) for axis in kept]).reshape(groups, -1)
