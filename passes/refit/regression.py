"""Streaming ridge regression of a layer's weights: W* = argmin ‖T - W X - b‖² + λ ‖W - W₀‖².

Only sums are kept: the Gram matrix of the inputs, their products with the targets, and the means. Groups (of a
grouped convolution) are regressions side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxzip.moments import ROUNDINGS
from fxzip.processes import Total

_SLICE = 2**24  # elements of the inputs that are multiplied at once, where there are not many of them
PRECISE, ROUGH = 1024, 0.03
"""Systems of more inputs than the first are solved in float32, if the ridge is no less than the second: what rounding
leaves is then far below what the ridge does."""
SLIGHT = 1e-3
"""Inputs whose variance is below this share of their mean square count for λ as if it were that share."""


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
        own = (
            [torch.tensor(self.count, dtype=torch.float64), self.products, self.residual, self.inputs]
            if self.count
            else None
        )
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
    since E[xx'] - mm' cancels.

    Args:
        intercept: Whether there is a b; without one nothing is shifted.
    """

    def __init__(self, intercept: bool = True) -> None:
        self.intercept = intercept
        self.count = 0
        self._shift: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._folded: tuple[Tensor, Tensor] | None = None
        self._factor: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """Add samples of the inputs (groups, d, samples)."""
        if self._shift is None:
            self.shift_by(x)
        groups, d, _ = x.shape
        most = max(_SLICE // (groups * d), 2 * d)
        for part in x.split(most, 2):
            self._waiting.append(part - self._shift if self.intercept else part)
            if sum(waiting.shape[2] for waiting in self._waiting) >= most:
                self._fold()
        self.count += x.shape[2]
        self._factor = None

    def _fold(self) -> None:
        """Take the products of the samples that wait: of many at once, as sums of matrices take their time, too."""
        x = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, 2)
        self._waiting.clear()
        sums = _gram(x).double(), x.sum(2).double()
        self._folded = sums if self._folded is None else (self._folded[0].add_(sums[0]), self._folded[1] + sums[1])

    @property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """The products of the shifted inputs (groups, d, d), and their sums (groups, d)."""
        if self._waiting:
            self._fold()
        assert self._folded is not None
        return self._folded

    def shift_by(self, x: Tensor) -> None:
        """Shift the samples to come by the means of these (groups, d, samples)."""
        self._shift = x.mean(2, keepdim=True) if self.intercept else x.new_zeros(*x.shape[:2], 1)

    @classmethod
    def of_sums(cls, intercept: bool, count: int, shift: Tensor, gram: Tensor, total: Tensor) -> Regression:
        """From the sums of so many samples that were shifted by some values.

        Args:
            intercept: As of `Regression`.
            count: How many samples.
            shift: What they were shifted by (groups, d, 1), of the dtype of the data.
            gram: The sums of their products (groups, d, d), float64.
            total: Their sums (groups, d), float64.
        """
        found = cls(intercept)
        found.count, found._shift, found._folded = count, shift, (gram, total)
        return found

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
        found.count = self.count + other.count
        found._folded = self._sums[0] + other._sums[0], self._sums[1] + other._sums[1]
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
        factor, damping = self._factored(ridge)
        if back is not None:
            products = products + damping[:, None, :] * back
        weights = torch.cholesky_solve(products.mT.to(factor.dtype), factor).mT.double()
        if told is not None:
            weights = weights * told[:, :, None]
        if not self.intercept:
            return weights, torch.zeros_like(mean)
        return weights, mean - (weights @ residuals.inputs[:, :, None])[..., 0] / residuals.count

    def spread(self, weights: Tensor) -> Tensor:
        """How much weights (groups, o, d) make of the inputs' variation: the variance of each output (groups, o)."""
        gram, _ = self.centred()
        return ((weights @ gram) * weights).sum(2).clamp_min(0) / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """The inputs' Gram matrix about their means (groups, d, d), and their sums of squares about 0 (groups, d)."""
        assert self._shift is not None
        gram, total = self._sums
        mean = self._shift[:, :, 0].double() + total / self.count
        if self.intercept:
            gram = torch.baddbmm(gram, total[:, :, None], total[:, None, :], alpha=-1 / self.count)
            return gram, gram.diagonal(dim1=1, dim2=2).clamp_min(0) + self.count * mean.square()
        return gram, gram.diagonal(dim1=1, dim2=2)

    def _factored(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the Gram matrix + λ, and λ for each input (groups, d)."""
        if self._factor is None:
            assert self._shift is not None
            gram, power = self.centred()
            rough = gram.shape[1] > PRECISE and ridge >= ROUGH
            self._factor = _factored(gram, damping(gram, power, ridge, noise_of(self._shift.dtype)), rough)
        return self._factor

    @property
    def noise(self) -> float:
        """The share of the sums that may be nothing but rounding."""
        assert self._shift is not None
        return noise_of(self._shift.dtype)

    @property
    def mean(self) -> Tensor:
        """The means of the inputs (groups, d); 0 without an intercept."""
        assert self._shift is not None
        return self._shift[:, :, 0].double() + self._sums[1] / self.count * self.intercept

    def about(self, place: Tensor) -> Tensor:
        """The Gram matrix about some values of the inputs (groups, d), that is (groups, d, d)."""
        assert self._shift is not None
        gram, total = self._sums
        gap = place - self._shift[:, :, 0].double()
        left, right = torch.stack([total, gap], 2), torch.stack([-gap, self.count * gap - total], 1)
        return torch.baddbmm(gram, left, right)


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


def noise_of(dtype: torch.dtype) -> float:
    """The share of a sum of products that may be nothing but rounding."""
    return ROUNDINGS * torch.finfo(dtype).eps


def damping(gram: Tensor, power: Tensor, ridge: float, noise: float) -> Tensor:
    """λ for each input (groups, d).

    It is ``ridge`` times the mean of the inputs' sums of squares about their means. Inputs that hardly vary have next
    to none, and dividing by that would make weights of any size out of rounding. So they count as if they varied by
    `SLIGHT`; and as products cancel to no less than ``noise`` of an input's power, its λ is no less, either.

    Args:
        gram: About the means (groups, d, d).
        power: Sums of squares about 0 (groups, d).
        ridge: λ as a share.
        noise: A share of the power that is rounding.
    """
    scale = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(0)
    whole = power.mean(1, keepdim=True)
    found = ridge * torch.maximum(scale, SLIGHT * whole) + 1e-9 * scale + torch.finfo(gram.dtype).tiny ** 0.5
    return torch.maximum(found, noise * power)


def _factored(gram: Tensor, added: Tensor, rough: bool) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``gram + λ``, with more λ where rounding leaves the matrix indefinite, and λ.

    Args:
        gram: (groups, d, d), float64.
        added: λ for each input (groups, d).
        rough: Try first whether float32 will do.
    """
    own = gram.diagonal(dim1=1, dim2=2)
    if rough:
        damped = gram.float()
        damped.diagonal(dim1=1, dim2=2).copy_(own + added)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return factor, added
    scale = own.mean(1, keepdim=True).clamp_min(0)
    damped = gram.clone()
    for _ in range(6):
        damped.diagonal(dim1=1, dim2=2).copy_(own + added)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return factor, added
        added = added * 10 + 1e-8 * scale
    raise ArithmeticError("the Gram matrix is not finite")
