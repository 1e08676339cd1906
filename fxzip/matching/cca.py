"""`cca`: CCA-Merge (Horoi et al., arXiv 2407.05385), linear maps that align models by canonical correlations."""

from __future__ import annotations

import numpy as np
import torch

from fxzip.errors import OptionError
from fxzip.matching.merge_map import MergeMap
from fxzip.matching.registry import matcher
from fxzip.matching.similarity import Floats
from fxzip.settings import MATCHING


@matcher("cca", of="covariance", options=MATCHING["cca"])
def _cca(covariance: Floats, n_models: int, gamma: float) -> MergeMap:
    """Every model is carried into the first one's basis by its canonical directions, then averaged.

    With canonical directions W_1 and W_k of the first model and of model k, W_1ᵀ x_1 and W_kᵀ x_k correlate as
    best they can, and T_k = W_1⁻ᵀ W_kᵀ carries x_k to x_1 (section 3.2). M = [T_1 ... T_N] / N and
    U = [T_1⁻¹; ...; T_N⁻¹] with T_1 = I. ``gamma`` is the regularisation, as a share of the mean variance of the
    model's channels. Unlike a permutation this commutes with no activation: it is here to compare with.
    """
    n = len(covariance) // n_models
    blocks = covariance.reshape(n_models, n, n_models, n)
    damping = [gamma * _mean_variance(blocks[k, :, k]) * np.eye(n) for k in range(n_models)]
    first, first_back = _whitening(blocks[0, :, 0] + damping[0])
    forth, back = [np.eye(n)], [np.eye(n)]
    for k in range(1, n_models):
        own, own_back = _whitening(blocks[k, :, k] + damping[k])
        left, _, right = np.linalg.svd(first @ blocks[0, :, k] @ own)
        forth.append(first_back @ left @ right @ own)
        back.append(own_back @ right.T @ left.T @ first)
    merge = torch.from_numpy(np.concatenate(forth, axis=1) / n_models)
    return MergeMap.from_matrices(merge, torch.from_numpy(np.concatenate(back, axis=0)), n_models)


def _mean_variance(covariance: Floats) -> float:
    return max(float(covariance.diagonal().mean()), float(np.finfo(np.float32).tiny))


def _whitening(covariance: Floats) -> tuple[Floats, Floats]:
    """C^(-1/2) and C^(1/2), both symmetric.

    Raises:
        OptionError: The covariance is singular, which gamma=0 may leave it.
    """
    values, vectors = np.linalg.eigh(covariance)
    if values[0] <= 0:
        raise OptionError("method 'cca' met a singular covariance: take gamma > 0")
    root = np.sqrt(values)
    return vectors / root @ vectors.T, vectors * root @ vectors.T
