"""The matchers that solve one assignment problem: `average`, `permute`, `optimal`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fxzip.errors import OptionError
from fxzip.matching.greedy import grouped
from fxzip.matching.registry import matcher
from fxzip.matching.similarity import Floats, Ints, with_dead_last
from fxzip.settings import MATCHING


@matcher("average")
def _average(similarity: Floats, n_models: int) -> Ints:
    """Channel j of every model goes to merged channel j: plain weight averaging."""
    return np.tile(np.arange(similarity.shape[0] // n_models), n_models)


@matcher("permute")
def _permute(similarity: Floats, n_models: int) -> Ints:
    """Each model is permuted onto the first so that the summed correlation is greatest.

    Linear sum assignment, as in "Convergent Learning" (Li et al., arXiv 1511.07543) and Git Re-Basin's
    activation matching (arXiv 2209.04836). Of more than two models each is matched with the first, as in
    ZipIt!'s released code. Merged channel j is channel j of the first model.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]

    n = similarity.shape[0] // n_models
    ranked = with_dead_last(similarity)
    assignment = np.tile(np.arange(n), n_models)
    for k in range(1, n_models):
        first, other = linear_sum_assignment(ranked[:n, k * n : (k + 1) * n], maximize=True)
        assignment[k * n + other] = first
    return assignment


@matcher("weights", of="weights")
def _weights(similarity: Floats, n_models: int) -> Ints:
    """`permute`, of how alike the channels' weights are (`fxzip.passes.match_weights`): it needs no data.

    Git Re-Basin's weight matching (Ainsworth et al., arXiv 2209.04836, algorithm 1).
    """
    return _permute(similarity, n_models)


@matcher("dual", of="weights", options=MATCHING["dual"])
def _dual(similarity: Floats, n_models: int, gamma: float) -> Ints:
    """`permute`, of a blend of weights and activations, ``gamma`` being the share of the activations.

    Dual-space matching (MuDSC; Xu et al., arXiv 2403.01753). The blend is made where the similarity is.
    """
    return _permute(similarity, n_models)


@matcher("optimal")
def _optimal(similarity: Floats, n_models: int) -> Ints:
    """The n disjoint pairs of the greatest summed similarity, within and across two models.

    Maximum-weight perfect matching (Edmonds' blossom algorithm, O(n³): with rustworkx seconds at n = 256 and minutes
    from n = 1024 on; without it networkx does the same, a hundred times slower). For more than two models the groups
    would have more than two members, which is NP-hard, so two models it is. Merged channels are ordered by their
    lowest member.
    """
    if n_models > 2:
        raise OptionError(f"method 'optimal' matches two models, got {n_models}; use 'zip' or 'permute'")
    if n_models == 1:
        return np.arange(similarity.shape[0])
    ranked = with_dead_last(similarity)
    # rustworkx wants whole numbers; 2⁴⁰ steps are finer than any correlation that is measured.
    steps = np.rint(ranked * (2.0**40 / max(np.abs(ranked).max(), 1e-300)))
    rows, columns = np.triu_indices(similarity.shape[0], k=1)
    weights = steps[rows, columns].astype(np.int64)
    edges = list(zip(rows.tolist(), columns.tolist(), weights.tolist(), strict=True))
    return grouped(_best_pairs(edges), similarity.shape[0])


def _best_pairs(edges: list[tuple[int, int, int]]) -> Iterable[tuple[int, int]]:
    """The disjoint pairs of the greatest summed weight, of as many nodes as can be paired."""
    try:
        import rustworkx
    except ImportError:
        import networkx

        plain = networkx.Graph()
        plain.add_weighted_edges_from(edges)
        pairs: Iterable[tuple[int, int]] = networkx.max_weight_matching(plain, maxcardinality=True)
        return pairs
    graph = rustworkx.PyGraph(multigraph=False)
    graph.extend_from_weighted_edge_list(edges)
    found: Iterable[tuple[int, int]] = rustworkx.max_weight_matching(graph, max_cardinality=True, weight_fn=int)
    return found
