"""First and second moments of all models' channels together.

Channels are numbered through the models: model ``m``'s channel ``c`` of a space of ``n`` channels is ``m * n
+ c``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = 4
"""A channel that varies by less than so many roundings of its own size is noise of the arithmetic."""
_RELATIVE_NOISE = ROUNDINGS * torch.finfo(torch.float32).eps
_SMALLEST_VARIANCE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of the channels of N models, in float64.

    Attributes:
        count: How many samples (batch items × positions × copies) were seen.
        mean: Mean of each channel, of shape (Σn,).
        scatter: Σ (x - mean)(x - mean)ᵀ over the samples, of shape (Σn, Σn), symmetric.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """The population covariance, scatter / count (``ddof = 0``: one sample gives zeros, not NaN)."""
        return self.scatter / max(self.count, 1)

    @property
    def dead(self) -> Tensor:
        """Which channels do not vary, bool of shape (Σn,).

        Relative to the channel's own scale: a standard deviation below some four float32 roundings of the
        mean is the noise of the arithmetic. Other channels set no scale, since one model may well be far
        smaller.
        """
        return is_noise(self.scatter.diagonal() / max(self.count, 1), self.mean)

    @property
    def correlation(self) -> Tensor:
        """Pearson correlation, of shape (Σn, Σn), with ones on the diagonal.

        A dead channel has correlation 0 with every other; nothing is ever divided by zero.
        """
        dead = self.dead
        variance = self.scatter.diagonal()
        scale = torch.where(dead, 0.0, torch.where(dead, 1.0, variance).rsqrt())
        correlation = (self.scatter * scale[:, None]).mul_(scale[None, :]).clamp_(-1.0, 1.0)
        correlation.fill_diagonal_(1.0)
        return correlation

    def combine(self, other: Moments) -> Moments:
        """The moments of both sets of samples together, by the update of Chan, Golub and LeVeque (1979).

        Raises:
            ValueError: the two are of different numbers of channels.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot combine moments of {len(self.mean)} and of {len(other.mean)} channels")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = torch.outer(delta, delta).mul_(self.count * other.count / count)
        return Moments(count, mean, between.add_(self.scatter).add_(other.scatter))

    def select(self, index: Tensor) -> Moments:
        """The moments of some channels only; ``index`` (int64 or bool) is into the Σn channels."""
        return Moments(self.count, self.mean[index], self.scatter[index][:, index])


def is_noise(variance: Tensor, mean: Tensor) -> Tensor:
    """Whether a variance is no more than the rounding of values of that mean, in float32."""
    return variance <= (_RELATIVE_NOISE * mean).square().clamp_min(_SMALLEST_VARIANCE)
