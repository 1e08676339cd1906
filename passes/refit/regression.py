"""Streaming ridge regression of a layer's weights: W* = argmin ‖T - W X - b‖² + λ ‖W - W₀‖².

Only sums are kept: the Gram matrix of the inputs, their products with the targets, and the means. Groups (of a
grouped convolution) are regressions side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxzip.passes.refit.systems import (
    PRECISE,
    ROUGH,
    OfInputs,
    OfSamples,
    System,
    damping_of,
    gram_of,
    noise_of,
)
from fxzip.processes import Processes, Total, exact

_SLICE = 2**24  # elements of the inputs that are multiplied at once, where there are not many of them
FEW = 0.7
"""Up to so many samples for each input it is less work to solve with these themselves than with the inputs' products,
several ridges included."""


class Residuals:
    """Sums of the residuals over samples, for g regressions of o outputs on d inputs each; float64.

    Attributes:
        count: How many samples.
        products: Of the residuals with the inputs (groups, o, d).
        residual: Of the residuals alone (groups, o).
        inputs: Of the inputs (groups, d).
    """

    def __init__(self) -> None:
        self.count = 0
        self.products = self.residual = self.inputs = torch.zeros((), dtype=torch.float64)

    def add(self, count: int, products: Tensor, residual: Tensor, inputs: Tensor) -> None:
        """Add the sums over ``count`` samples."""
        self.count += count
        self.products = self.products + products
        self.residual = self.residual + residual
        self.inputs = self.inputs + inputs

    def over_all(self, total: Total) -> Residuals:
        """Those of the samples of all processes."""
        found = Residuals()
        own = [exact(self.count), self.products, self.residual, self.inputs] if self.count else None
        sums = total("residuals", own)
        if sums:  # else there are no samples anywhere
            found.add(round(float(sums[0])), *sums[1:])
        return found

    def plus(self, other: Residuals) -> Residuals:
        """Those of both samples."""
        found = Residuals()
        for part in (self, other):
            found.add(part.count, part.products, part.residual, part.inputs)
        return found


class Regression:
    """The inputs of g regressions of o outputs on d inputs each, and steps that solve them.

    W is found from its residuals: a step with the Gram matrix of the same samples is the solution. One
    with that of others (fewer of them, or from before the inputs changed a little) comes close, and the next closer.

    The sums are float64; products are taken in the dtype of the data, of inputs shifted by the first batch's means,
    since E[xx'] - mm' cancels. Where samples are few, they are kept in the place of their products.

    Args:
        intercept: Whether there is a b; without one nothing is shifted.

    Attributes:
        count: How many samples.
    """

    def __init__(self, intercept: bool = True) -> None:
        self.intercept = intercept
        self.count = 0
        self._shift: Tensor | None = None
        self._total = torch.zeros((), dtype=torch.float64)
        self._waiting: list[Tensor] = []
        self._folded: Tensor | None = None
        self._last: tuple[float, System] | None = None

    def add(self, x: Tensor) -> None:
        """Add samples of the inputs (groups, d, samples)."""
        if self._shift is None:
            self.shift_by(x)
        groups, d, _ = x.shape
        most = max(_SLICE // (groups * d), 2 * d)
        for part in x.split(most, 2):
            self._waiting.append(part - self._shift if self.intercept else part)
            self._total = self._total + self._waiting[-1].sum(2).double()
            if sum(waiting.shape[2] for waiting in self._waiting) >= most:
                self._fold()
        self.count += x.shape[2]
        self._last = None

    def _fold(self) -> Tensor:
        """The products of the shifted inputs (groups, d, d).

        Those of the samples that wait are taken of many at once, as sums of matrices take their time, too.
        """
        if self._waiting:
            gram = gram_of(self._joined()).double()
            self._folded = gram if self._folded is None else self._folded.add_(gram)
            self._waiting.clear()
        assert self._folded is not None
        return self._folded

    def _joined(self) -> Tensor:
        return self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, 2)

    def _few(self, count: int) -> bool:
        """Whether so many samples take less work than their products."""
        return self._folded is None and bool(self._waiting) and count <= FEW * self._waiting[0].shape[1]

    def shift_by(self, x: Tensor) -> None:
        """Shift the samples to come by the means of these (groups, d, samples)."""
        self._shift = x.mean(2, keepdim=True) if self.intercept else x.new_zeros(*x.shape[:2], 1)

    def beside(self) -> Regression:
        """One for other samples, shifted by the same values, so that both can be added."""
        found = Regression(self.intercept)
        found._shift = self._shift
        return found

    def plus(self, other: Regression) -> Regression:
        """The samples of both, of which one was made `beside` the other."""
        if not self.count or not other.count:
            return self if self.count else other
        found = self.beside()
        found.count, found._total = self.count + other.count, self._total + other._total
        if self._few(found.count) and other._few(found.count):
            found._waiting = [*self._waiting, *other._waiting]
        else:
            found._folded = self._fold() + other._fold()
        return found

    def step(
        self, residuals: Residuals, ridge: float, back: Tensor | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What to add to the weights and the bias, float64.

        Args:
            residuals: Those of the present weights.
            ridge: λ as a share of the mean of the inputs' sums of squares.
            back: W₀ - W, towards which weights go that the samples do not determine (groups, o, d).
            told: The outputs whose weights may change (groups, o); None: all.

        Returns:
            Changes of the weights (groups, o, d) and of the biases (groups, o).

        Raises:
            ArithmeticError: The inputs are not finite.
        """
        products, mean = residuals.products, residuals.residual / residuals.count
        if self.intercept:
            products = torch.baddbmm(products, mean[:, :, None], residuals.inputs[:, None, :], alpha=-1)
        products = products * (self.count / residuals.count)
        if self._last is None or self._last[0] != ridge:
            self._last = ridge, self.system(ridge, rough=products.shape[2] > PRECISE and ridge >= ROUGH)
        system = self._last[1]
        if back is not None:
            products = products + system.damping[:, None, :] * back
        weights = system.solve(products)
        if told is not None:
            weights = weights * told[:, :, None]
        if not self.intercept:
            return weights, torch.zeros_like(mean)
        return weights, mean - (weights @ residuals.inputs[:, :, None])[..., 0] / residuals.count

    def system(self, ridge: float, rough: bool = False) -> System:
        """What solves for these inputs with a ridge; ``rough``: in float32 where it can be factorised so.

        Raises:
            ArithmeticError: The inputs are not finite.
        """
        assert self._shift is not None
        noise = noise_of(self._shift.dtype)
        if self._few(self.count):
            x = self._joined()
            x = x - self._drift[:, :, None].to(x) if self.intercept else x
            own = x.square().sum(2).double()
            return OfSamples.of(x, damping_of(own, self._power(own), ridge, noise), rough and ridge >= ROUGH)
        gram = self.centred()
        own = gram.diagonal(dim1=1, dim2=2)
        return OfInputs.of(gram, damping_of(own, self._power(own), ridge, noise), rough)

    def centred(self) -> Tensor:
        """The inputs' Gram matrix about their means (groups, d, d)."""
        gram, total = self._fold(), self._total
        if self.intercept:
            return torch.baddbmm(gram, total[:, :, None], total[:, None, :], alpha=-1 / self.count)
        return gram

    def _power(self, own: Tensor) -> Tensor:
        """The sums of squares about 0, of those about the means (groups, d)."""
        return own.clamp_min(0) + self.count * self.mean.square() if self.intercept else own

    @property
    def _drift(self) -> Tensor:
        """How far the means are from what the samples are shifted by (groups, d)."""
        return self._total / self.count

    @property
    def mean(self) -> Tensor:
        """The means of the inputs (groups, d); 0 without an intercept."""
        assert self._shift is not None
        return self._shift[:, :, 0].double() + self._drift * self.intercept

    def made_by(self, weights: Tensor, place: Tensor) -> Tensor:
        """Σ (W (x - place))² over the samples, for weights (groups, o, d) and a place (groups, d): (groups, o)."""
        assert self._shift is not None
        gap = place - self._shift[:, :, 0].double()
        if self._few(self.count):
            x = self._joined()
            return (weights.to(x) @ (x - gap[:, :, None].to(x))).double().square().sum(2)
        return ((weights @ self._about(gap).to(weights)) * weights).sum(2, dtype=torch.float64)

    def _about(self, gap: Tensor) -> Tensor:
        """The Gram matrix about a place so far from what samples are shifted by (groups, d)."""
        left, right = torch.stack([self._total, gap], 2), torch.stack([-gap, self.count * gap - self._total], 1)
        return torch.baddbmm(self._fold(), left, right)

    def over_all(self, place: Tensor, processes: Processes) -> Regression:
        """That of the samples of all processes, shifted by a place (groups, d); few samples go to all of them."""
        found, counts = Regression(self.intercept), processes.everywhere("samples", self.count)
        found.count, found._shift = sum(counts), place[:, :, None]
        if not found.count:
            return found
        gap = 0 * place.double() if self._shift is None else place.double() - self._shift[:, :, 0].double()
        if found.count <= FEW * place.shape[1]:
            own = place.new_zeros(*place.shape, found.count, dtype=torch.float64)
            if self.count:
                own.narrow(2, sum(counts[: processes.rank]), self.count).copy_(self._joined() - gap[:, :, None])
            (samples,) = processes.total("samples of a layer", [own])
            found._waiting, found._total = [samples.to(place)], samples.sum(2)
        else:
            sums = [self._about(gap), self._total - self.count * gap] if self.count else None
            found._folded, found._total = processes.total("Gram matrices", sums, place.device)
        return found
