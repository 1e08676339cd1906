"""Systems of ridge regression: products with (X Xᵀ + Λ)⁻¹, for inputs X about their means.

Where there are fewer samples than inputs (the first linear layer of a VGG has 25,088 inputs), the samples' products
XᵀX are the smaller matrix, and by Woodbury's identity they give the same solution:

    (X Xᵀ + Λ)⁻¹ = Λ^-½ (1 - S (1 + Sᵀ S)⁻¹ Sᵀ) Λ^-½,    S = Λ^-½ X
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzip.moments import ROUNDINGS

PRECISE, ROUGH = 1024, 0.03
"""Systems of more inputs than the first are solved in float32, if the ridge is no less than the second: what rounding
leaves is then far below what the ridge does."""
SLIGHT = 1e-3
"""Inputs whose variance is below this share of their mean square count for λ as if it were that share."""
_TRIES = 6
"""How often λ is raised where rounding leaves a matrix indefinite."""


class System(ABC):
    """A factorised system for g regressions on d inputs each.

    Attributes:
        damping: Λ, for each input (groups, d), float64.
    """

    damping: Tensor

    @abstractmethod
    def solve(self, products: Tensor) -> Tensor:
        """``products`` (X Xᵀ + Λ)⁻¹ for products (groups, o, d), float64."""


@dataclass(frozen=True, eq=False)
class OfInputs(System):
    """Solved with the inputs' products, d × d."""

    damping: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: Tensor, rough: bool) -> OfInputs:
        """Factorise ``gram`` (groups, d, d) + Λ.

        Raises:
            ArithmeticError: It is not finite.
        """
        own = gram.diagonal(dim1=1, dim2=2)
        factor, added = _factored(gram, own, damping, own.mean(1, keepdim=True).clamp_min(0), rough)
        return cls(added, factor)

    def solve(self, products: Tensor) -> Tensor:
        """As of `System`."""
        return torch.cholesky_solve(products.mT.to(self.factor.dtype), self.factor).mT.double()


@dataclass(frozen=True, eq=False)
class OfSamples(System):
    """Solved with the samples' products, n × n."""

    damping: Tensor
    factor: Tensor
    scaled: Tensor

    @classmethod
    def of(cls, x: Tensor, damping: Tensor, rough: bool) -> OfSamples:
        """Factorise for inputs about their means (groups, d, n).

        Raises:
            ArithmeticError: They are not finite.
        """
        work = torch.float32 if rough else torch.float64
        scaled = (x / damping.sqrt()[:, :, None]).to(work)
        one = torch.ones((), dtype=work, device=x.device)
        inner = gram_of(scaled.mT)
        factor, _ = _factored(inner, inner.diagonal(dim1=1, dim2=2), one, one, rough)
        return cls(damping, factor, scaled)

    def solve(self, products: Tensor) -> Tensor:
        """As of `System`."""
        root = self.damping.sqrt()[:, None, :]
        whitened = products / root
        seen = whitened.to(self.scaled.dtype) @ self.scaled
        explained = torch.cholesky_solve(seen.mT, self.factor).mT @ self.scaled.mT
        return (whitened - explained) / root


def _factored(matrix: Tensor, own: Tensor, added: Tensor, scale: Tensor, rough: bool) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``matrix`` + what is added to its diagonal, with more where it is indefinite, and that.

    Args:
        matrix: (groups, size, size).
        own: Its diagonal.
        added: What is added.
        scale: What the diagonal's elements are like.
        rough: Try first whether float32 will do.
    """
    for work in (torch.float32, torch.float64) if rough else (torch.float64,):
        damped, more = matrix.to(work, copy=True), added
        for _ in range(1 if work == torch.float32 else _TRIES):
            damped.diagonal(dim1=1, dim2=2).copy_(own + more)
            factor, info = torch.linalg.cholesky_ex(damped)
            if not bool(info.any()):
                return factor, more
            more = more * 10 + 1e-8 * scale
    raise ArithmeticError("the Gram matrix is not finite")


def gram_of(x: Tensor) -> Tensor:
    """``x @ x.mT`` for (groups, d, n), of which only little more than half is computed where it is large."""
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


def damping_of(own: Tensor, power: Tensor, ridge: float, noise: float) -> Tensor:
    """λ for each input (groups, d).

    It is ``ridge`` times the mean of the inputs' sums of squares about their means. Inputs that hardly vary have next
    to none, and dividing by that would make weights of any size out of rounding. So they count as if they varied by
    `SLIGHT`; and as products cancel to no less than ``noise`` of an input's power, its λ is no less, either.

    Args:
        own: Sums of squares about the means (groups, d).
        power: Sums of squares about 0 (groups, d).
        ridge: λ as a share.
        noise: A share of the power that is rounding.
    """
    scale = own.mean(1, keepdim=True).clamp_min(0)
    whole = power.mean(1, keepdim=True)
    found = ridge * torch.maximum(scale, SLIGHT * whole) + 1e-9 * scale + torch.finfo(own.dtype).tiny ** 0.5
    return torch.maximum(found, noise * power)
