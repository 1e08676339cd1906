"""Streaming ridge regression of a layer's weights: W* = argmin ‖T - W X - b‖² + λ ‖W - W₀‖².

Only sums are kept: the Gram matrix of the inputs, their products with the targets, and the means. Groups (of a
grouped convolution) are regressions side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SLICE = 2**24  # elements of the inputs that are shifted and multiplied at once


class Regression:
    """Sums for g regressions of o outputs on d inputs each.

    The sums are float64; products are taken in the dtype of the data, of values shifted by the first batch's
    means, since E[xx'] - mm' cancels.

    Args:
        intercept: Whether there is a b; without one nothing is shifted.
    """

    def __init__(self, intercept: bool = True) -> None:
        self.intercept = intercept
        self.count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def forget_targets(self) -> None:
        """Forget all targets; new ones are added by `add_targets`, for the same inputs."""
        for total in self._sums[1::2]:
            total.zero_()

    def add_targets(self, x: Tensor, t: Tensor) -> None:
        """Add targets of inputs that were added before; arguments as for `add`."""
        assert self._shift is not None
        step = max(1, _SLICE // (x.shape[0] * x.shape[1]))
        for part_x, part_t in zip(x.split(step, 2), t.split(step, 2), strict=True):
            if self.intercept:
                part_x, part_t = part_x - self._shift[0], part_t - self._shift[1]
            self._sums[1] += part_t @ part_x.mT
            self._sums[3] += part_t.sum(2)

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add samples.

        Args:
            x: Inputs (groups, d, samples).
            t: Targets (groups, o, samples).
        """
        if self._shift is None:
            self._shift = (x.mean(2, keepdim=True), t.mean(2, keepdim=True))
        step = max(1, _SLICE // (x.shape[0] * x.shape[1]))
        for part_x, part_t in zip(x.split(step, 2), t.split(step, 2), strict=True):
            self._add(part_x, part_t)
        self.count += x.shape[2]

    def _add(self, x: Tensor, t: Tensor) -> None:
        assert self._shift is not None
        if self.intercept:
            x, t = x - self._shift[0], t - self._shift[1]
        sums = [_gram(x), t @ x.mT, x.sum(2), t.sum(2)]
        if self._sums:
            for total, part in zip(self._sums, sums, strict=True):
                total += part
        else:
            self._sums = [part.double() for part in sums]

    def solve(self, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """The weights and the bias, float64.

        Args:
            prior: W₀ (groups, o, d): what the weights are where the samples say nothing.
            ridge: λ as a share of the mean of the inputs' sums of squares.

        Returns:
            Weights (groups, o, d) and biases (groups, o).
        """
        assert self._shift is not None
        gram, cross, sum_x, sum_t = self._sums
        if self.intercept:
            gram = torch.baddbmm(gram, sum_x[:, :, None], sum_x[:, None, :], alpha=-1 / self.count)
            cross = torch.baddbmm(cross, sum_t[:, :, None], sum_x[:, None, :], alpha=-1 / self.count)
        prior = prior.to(gram)
        weights = prior + _solve(gram, cross - prior @ gram, ridge)
        if not self.intercept:
            return weights, torch.zeros_like(sum_t)
        mean_x = self._shift[0][..., 0].double() + sum_x / self.count
        mean_t = self._shift[1][..., 0].double() + sum_t / self.count
        return weights, mean_t - (weights @ mean_x[:, :, None])[..., 0]


def _gram(x: Tensor) -> Tensor:
    """``x @ x.mT``, of which only little more than half is computed where it is large."""
    d = x.shape[1]
    if d <= 512:
        return x @ x.mT
    gram = x.new_empty(len(x), d, d)
    height = max(256, d // 8)
    for start in range(0, d, height):
        panel = x[:, start : start + height] @ x[:, start:].mT
        gram[:, start : start + height, start:] = panel
        gram[:, start:, start : start + height] = panel.mT
    return gram


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``right @ inv(gram + λ)``, with more λ where rounding leaves the matrix indefinite."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    damping = ridge * scale + 1e-9 * scale + torch.finfo(gram.dtype).tiny ** 0.5
    damped = gram.clone()
    for _ in range(6):
        damped.diagonal(dim1=1, dim2=2).copy_(gram.diagonal(dim1=1, dim2=2) + damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return torch.cholesky_solve(right.mT, factor).mT
        damping = damping * 10 + 1e-8 * scale
    raise ArithmeticError("the Gram matrix is not finite")


def scale_and_shift(
    values: Sequence[Tensor], goals: Sequence[Tensor], axis: int, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """The least-squares line t ≈ a x + b for each channel along an axis, float64.

    Args:
        values: x, in batches.
        goals: t, in batches of the same shapes.
        axis: Where the channels lie.
        intercept: Whether there is a b; else it is 0.

    Returns:
        a and b; a = 1 where x is constant.
    """

    def mean(of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = ((v.movedim(axis, 0).flatten(1) for v in pair) for pair in zip(values, goals, strict=True))
        parts = [of(x.double(), t.double()).sum(1) for x, t in rows]
        return torch.stack(parts).sum(0) * (len(parts[0]) / sum(v.numel() for v in values))

    zero = torch.zeros((), dtype=torch.float64, device=values[0].device)
    mean_x, mean_t = (mean(lambda x, _: x), mean(lambda _, t: t)) if intercept else (zero, zero)
    power = mean(lambda x, _: (x - mean_x[..., None]).square())
    product = mean(lambda x, t: (x - mean_x[..., None]) * (t - mean_t[..., None]))
    flat = power <= 1e-12 * power.max().clamp(min=1e-30)
    slope = torch.where(flat, torch.ones_like(power), product / power.clamp(min=1e-30))
    return slope, (mean_t - slope * mean_x) if intercept else torch.zeros_like(slope)
