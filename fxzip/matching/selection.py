"""The matcher that keeps channels instead of averaging them: `select`.

Averaging two channels that are not alike gives one that is like neither. With a refit behind it the merged
network does better to keep n of the Σn channels as they are, those that the others can be told from, and to
let the next layers' weights find the rest from them.
"""

from __future__ import annotations

import numpy as np
import torch

from fxzip.matching.merge_map import MergeMap
from fxzip.matching.registry import matcher
from fxzip.matching.similarity import Floats, Ints
from fxzip.settings import MATCHING

_EXPLAINED = 1e-6
"""Share of the largest variance below which what is left of a channel counts as explained: U stays of moderate size."""
_DAMPING = 1e-10
_COPY = 1e-6
"""What a channel may differ from a kept one and still be its copy, as a share of its variance."""


@matcher("select", of="covariance", options=MATCHING["select"], sized=True)
def _select(covariance: Floats, n_models: int, samples: float | None, size: int) -> MergeMap:
    """Keep the ``size`` channels that leave the least variance unexplained, each next one given those before.

    Cholesky decomposition with pivoting on the covariance (Higham, "Analysis of the Cholesky decomposition of
    a semi-definite matrix", 1990): the next channel is the one of the greatest variance that the kept ones do
    not explain. U is the regression of all channels on the kept ones, M has one 1 in each row. Merged channels
    are in the order of the kept ones' numbers. Each model's variances are first scaled to a mean of one, so
    that a model with larger activations is not preferred.

    Of few samples a regression on many channels tells more of their noise than of anything else. So covariances are
    shrunk for it (`shrinkage`), but for copies of a kept channel, which need no regression.
    """
    alike = equalised(covariance, n_models)
    found = pivots(alike, size)
    left = np.setdiff1d(np.arange(len(covariance)), found)[: size - len(found)]
    kept = np.sort(np.concatenate([found, left]))
    unmerge = np.zeros((len(covariance), size))
    damping = shrinkage(alike, samples) if samples else 0.0
    unmerge[:, np.searchsorted(kept, found)] = regression(covariance, found, damping)
    unmerge[kept] = np.eye(size)
    return MergeMap.from_selection(torch.from_numpy(kept), torch.from_numpy(unmerge), n_models)


def scales(covariance: Floats, n_models: int) -> Floats:
    """What to multiply each channel by so that each model's variances have a mean of one; (Σn,)."""
    n = len(covariance) // n_models
    power = covariance.diagonal().reshape(n_models, n).mean(1)
    found: Floats = np.repeat(1 / np.sqrt(np.where(power > 0, power, 1.0)), n)
    return found


def equalised(covariance: Floats, n_models: int) -> Floats:
    """The covariance with each model's variances scaled to a mean of one."""
    scale = scales(covariance, n_models)
    found: Floats = covariance * scale[:, None] * scale[None, :]
    return found


def pivots(covariance: Floats, count: int) -> Ints:
    """The first ``count`` pivots, as of `pivoted`."""
    return pivoted(covariance, count)[0]


def pivoted(covariance: Floats, count: int) -> tuple[Ints, Floats]:
    """The first ``count`` pivots of a Cholesky decomposition, in their order; of equals the lowest first.

    They are fewer where fewer explain everything (dead channels, fewer samples than channels).

    Returns:
        The pivots, and what each of them leaves unexplained of all channels' variance, both (pivots,).
    """
    left = covariance.diagonal().copy()
    unexplained = np.empty(count)
    noise = _EXPLAINED * float(left.max(initial=0.0))
    factor = np.zeros((count, len(covariance)))
    found = np.empty(count, dtype=np.int64)
    for step in range(count):
        pivot = int(np.argmax(left))
        if left[pivot] <= noise:
            return found[:step], unexplained[:step]
        found[step] = pivot
        row = (covariance[pivot] - factor[:step, pivot] @ factor[:step]) / np.sqrt(left[pivot])
        row[found[:step]] = 0.0
        factor[step] = row
        left = np.maximum(left - row * row, 0.0)
        left[found[: step + 1]] = 0.0
        unexplained[step] = left.sum()
        left[found[: step + 1]] = -1.0
    return found, unexplained


def shrinkage(covariance: Floats, samples: float) -> float:
    """How far covariances of so few independent samples are to be shrunk towards uncorrelated channels, 0 to 1.

    The oracle-approximating estimate of Chen, Wiesel, Eldar and Hero ("Shrinkage algorithms for MMSE covariance
    estimation", 2010, equation 23), which is closed.
    """
    size, trace = len(covariance), float(np.trace(covariance))
    squares = float(np.square(covariance).sum())
    left = (samples + 1 - 2 / size) * (squares - trace**2 / size)
    return min(1.0, ((1 - 2 / size) * squares + trace**2) / left) if left > 0 else 1.0


def regression(covariance: Floats, kept: Ints, shrunk: float = 0.0) -> Floats:
    """All channels from linearly independent kept ones by least squares: (Σn, kept).

    Args:
        covariance: (Σn, Σn).
        kept: The channels that are kept.
        shrunk: What covariances, but not variances, are reduced by.
    """
    from scipy.linalg import cho_factor, cho_solve

    if len(kept) == 0:
        return np.zeros((len(covariance), 0))
    shrunk = min(shrunk, 1 - 1e-6)
    own, cross = covariance[np.ix_(kept, kept)].copy(), covariance[kept]
    own.flat[:: len(own) + 1] *= 1 + _DAMPING + shrunk / (1 - shrunk)
    weights: Floats = cho_solve(cho_factor(own, lower=True), cross).T
    variance = covariance.diagonal()
    slope = cross / variance[kept][:, None]
    left = variance - slope * cross  # (kept, Σn): what each kept channel leaves of every one by itself
    nearest, every = left.argmin(0), np.arange(len(covariance))
    copies = left[nearest, every] <= _COPY * variance
    weights[copies] = 0.0
    weights[copies, nearest[copies]] = slope[nearest[copies], every[copies]]
    return weights
