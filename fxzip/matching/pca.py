"""`pca`: the principal components of all models' channels together, for spaces that any orthogonal map is exact for.

No linear map to as many channels leaves less of the models' channels unexplained. With V the components (Σn, n_out) of
the models side by side, M = Vᵀ / √N and U = √N V, so that what is merged is as large as what each model has. By the CS
decomposition of two models, V is an orthogonal map of each one's channels and then a weighted mean of those of equal
number, the squares of the weights summing to 1: RMSNorms without scales, as `fxzip.passes.linearise` writes them, are
indifferent to the first.
"""

from __future__ import annotations

import numpy as np
import torch

from fxzip.matching.merge_map import MergeMap
from fxzip.matching.registry import matcher
from fxzip.matching.selection import scales
from fxzip.matching.similarity import Floats
from fxzip.settings import MATCHING


@matcher("pca", of="covariance", options=MATCHING["pca"], sized=True, elsewhere="select")
def _pca(covariance: Floats, n_models: int, samples: float | None, size: int) -> MergeMap:
    """The ``size`` directions of the greatest variance, each model's channels first scaled to the same variance.

    ``samples`` is for the spaces that are not linear (`select`).
    """
    scale = scales(covariance, n_models)
    vectors = np.linalg.eigh(covariance * scale[:, None] * scale[None, :])[1][:, ::-1][:, :size]
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(size)])  # a direction's sign is no more than a convention
    unit = scale.mean() * np.sqrt(n_models)  # the merged stream is then as large as each model's: norms see no change
    merge, unmerge = vectors.T * (scale / unit)[None, :], vectors * (unit / scale)[:, None]
    return MergeMap(n_models, None, (torch.from_numpy(merge.copy()), torch.from_numpy(unmerge.copy())))
