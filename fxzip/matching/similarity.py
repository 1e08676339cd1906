"""Similarity matrices: what is accepted, and which channels are dead."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxzip.errors import OptionError

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


def check_n_models(n_models: int) -> None:
    """Raises OptionError unless N is a whole number of at least one."""
    if not isinstance(n_models, int | np.integer) or n_models < 1:
        raise OptionError(f"n_models must be a whole number of at least 1, got {n_models!r}")


def as_similarity(similarity: Tensor | npt.ArrayLike, n_models: int) -> Floats:
    """A fresh float64 array, made symmetric from its upper triangle; its diagonal is as given."""
    check_n_models(n_models)
    if isinstance(similarity, Tensor):
        dtype = torch.complex128 if similarity.is_complex() else torch.float64
        similarity = similarity.detach().to("cpu", dtype).numpy()
    try:
        given = np.asarray(similarity)
        if np.iscomplexobj(given):
            raise TypeError("it is complex")
        given = given.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"similarity must be a matrix of real numbers: {error}") from error
    if given.ndim != 2 or given.shape[0] != given.shape[1] or given.shape[0] == 0:
        raise OptionError(f"similarity must be a square matrix, got shape {given.shape}")
    if given.shape[0] % n_models:
        raise OptionError(f"similarity of {given.shape[0]} channels does not divide into {n_models} models")
    if not np.isfinite(given).all():
        raise OptionError("similarity has NaN or infinite entries; give dead channels similarity 0")
    return _mirrored(given)


def _mirrored(upper: Floats, block: int = 256) -> Floats:
    """A symmetric copy made of the upper triangle, block by block, so that both sides stay in the cache."""
    values = upper.copy()
    for start in range(0, len(values), block):
        stop = start + block
        corner = values[start:stop, start:stop]
        corner[:] = np.triu(corner) + np.triu(corner, k=1).T
        values[stop:, start:stop] = values[start:stop, stop:].T
    return values


def dead_channels(similarity: Floats) -> Bools:
    """Which channels have similarity 0 to every other channel; shape (Σn,)."""
    others = np.count_nonzero(similarity, axis=1) - (similarity.diagonal() != 0)
    return np.asarray(others == 0)


def with_dead_last(similarity: Floats) -> Floats:
    """The similarity with every pair that has a dead channel put below every pair that has none.

    Then each assignment of the greatest weight has as few such pairs as there can be.
    """
    dead = dead_channels(similarity)
    if not dead.any():
        return similarity
    return np.where(dead[:, None] | dead[None, :], similarity.min() - 1.0, similarity)
