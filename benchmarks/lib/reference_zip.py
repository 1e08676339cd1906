"""ZipIt!'s greedy matching, slow and plain: the oracle of `fxzip.matching.zip_merges`.

Written from section 4.3 of the paper (arXiv 2305.03053) and fxzip's rules for what the paper leaves open. A
feature is the tuple of its channels; everything else is worked out anew from the features at each step, and
each step looks at all pairs.
"""

from __future__ import annotations

import numpy as np


def reference_zip_merges(similarity: np.ndarray, n_models: int, alpha: float, beta: float) -> list[tuple[int, int]]:
    """The merges in their order, as pairs of the features' lowest channels.

    Args:
        similarity: Symmetric and finite, shape (Σn, Σn).
        n_models: N.
        alpha: The factor on a merged feature's similarities.
        beta: The budget of within-model merges; 0 asks for groups with one channel of each model.
    """
    similarity = np.array(similarity, dtype=np.float64)
    size = len(similarity)
    n = size // n_models
    features: list[tuple[int, ...]] = [(channel,) for channel in range(size)]
    waiting = {c for c in range(size) if not np.delete(similarity[c], c).any()}
    one_of_each = beta == 0
    budget = [max(int((size - n) // n_models * beta + 1e-4), 0 if one_of_each else 1)] * n_models
    kept: list[set[int]] = [set() for _ in features]  # models that were closed when a feature got a channel of theirs
    merges = []
    while len(features) > n:
        members = [own | more for own, more in zip(_members(features, n, one_of_each), kept, strict=True)]
        allowed = _allowed(features, members, budget, waiting)
        if one_of_each and sum(len(feature) > 1 for feature in features) == n:
            single = np.array([len(feature) == 1 for feature in features])
            allowed &= ~(single[:, None] & single[None, :])
        scores = np.where(allowed, similarity, -np.inf)
        a, b = np.unravel_index(scores.argmax(), scores.shape)
        if scores[a, b] == -np.inf:
            assert waiting or any(kept)
            if waiting:
                waiting = set()
            else:
                kept = [set() for _ in features]
            continue
        for model in members[a] & members[b]:
            budget[model] -= 1
        kept[a] |= {model for model in members[b] if budget[model] == 0}
        kept.pop(b)
        merges.append((features[a][0], features[b][0]))
        features[a] += features.pop(b)
        merged = np.minimum(similarity[a], similarity[b]) * alpha
        similarity[a, :] = merged
        similarity[:, a] = merged
        similarity = np.delete(np.delete(similarity, b, axis=0), b, axis=1)
    return merges


def _members(features: list[tuple[int, ...]], n: int, one_of_each: bool) -> list[set[int]]:
    """The models that each feature counts as: all of its channels', or the lowest-numbered of them."""
    models = [{channel // n for channel in feature} for feature in features]
    return models if one_of_each else [{min(of)} for of in models]


def _allowed(
    features: list[tuple[int, ...]], members: list[set[int]], budget: list[int], waiting: set[int]
) -> np.ndarray:
    """Which pairs (a, b), a < b, may be merged: neither waits, and no model of both is out of budget."""
    kept_out = np.array([feature[0] in waiting for feature in features])
    forbidden = kept_out[:, None] | kept_out[None, :]
    for model, left in enumerate(budget):
        if left == 0:
            counted = np.array([model in of for of in members])
            forbidden |= counted[:, None] & counted[None, :]
    return np.triu(~forbidden, k=1)
