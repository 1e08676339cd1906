"""The matcher `zip`: ZipIt!'s greedy matching within and across models, in about O(n²).

What it computes is arXiv 2305.03053, section 4.3, and what the paper's released code does
(``match_tensors_zipit`` with its ``a`` and ``b``), with the corrections that `zip_merges` names.

Why it is fast: each row of the similarity matrix keeps the best of its entries right of the diagonal, as in
Müllner's generic linkage (arXiv 1109.2378). Similarities mostly fall, so an outdated best value still bounds
its row from above, and a row is searched again only when its bound is the highest of all.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fxzip.matching.registry import matcher
from fxzip.matching.similarity import Floats, Ints, dead_channels
from fxzip.settings import MATCHING


@matcher("zip", options=MATCHING["zip"], sized=True)
def _zip(similarity: Floats, n_models: int, alpha: float, beta: float, size: int) -> Ints:
    """ZipIt!'s greedy matching; by default merged channels merge again freely, within models too.

    Merged channels are ordered by their lowest member.
    """
    return grouped(zip_merges(similarity, n_models, alpha, beta, size), similarity.shape[0])


def grouped(merges: Iterable[tuple[int, int]], size: int) -> Ints:
    """The assignment (Σn,) that these merges make, merged channels ordered by their lowest member.

    Args:
        merges: Pairs of features in the order of merging, each feature named by its lowest channel.
        size: Σn.
    """
    lowest = np.arange(size)
    for pair in merges:
        lowest[max(pair)] = min(pair)
    for channel in range(size):  # upwards, so that what a channel points to is resolved before it
        lowest[channel] = lowest[lowest[channel]]
    return np.unique(lowest, return_inverse=True)[1].astype(np.int64)


def zip_merges(
    similarity: Floats, n_models: int, alpha: float, beta: float, size: int | None = None
) -> list[tuple[int, int]]:
    """The merges of ZipIt!'s greedy matching, in their order.

    All Σn channels start as features of their own. The pair i < j of the highest similarity (ties: lowest i,
    then lowest j) is merged into i, until n features are left. A merged feature's similarity to any other is
    the minimum of its parts', times alpha. It counts as the lower-numbered model's. Each model may make
    int(⌊(Σn - n) / N⌋ · beta + 1e-4) within-model merges, one where that is none; from then on pairs of its
    features are forbidden, and stay so for what these are merged into: from then on a merged feature counts as
    that model's too.

    Beyond the released code:

    * beta = 0 is a permutation merge, as the paper says: each group ends with one channel of each model. A
      merged feature then counts as *every* model's that it has a channel of, and no two features of a common
      model are merged. Nor are two single channels while there are n features of more than one channel: from
      three models on these could come to overlap (ab, ac, bc) and never be completed.
    * Dead channels (similarity 0 to every other) are kept out until no other pair may be merged.
    * alpha = 0 gives merged features the similarity 0, and forbids nothing.
    * Any number of features may be left. Where every pair left is forbidden before they are so few (a small beta,
      fewer than n), all pairs are allowed.
    * From three models on, where every pair left is forbidden, merged features count as the lower-numbered
      model's only again. (The released code drops a channel there.)

    Args:
        similarity: Finite and symmetric, shape (Σn, Σn); it is left as it is.
        n_models: N.
        alpha: What a merged feature's similarities are multiplied by, in [0, 1].
        beta: The budget of within-model merges, in [0, 1].
        size: How many features are to be left; None: n.

    Returns:
        The Σn - size merges as pairs (i, j), i < j: feature j goes into feature i, each named by its lowest
        channel.
    """
    size = similarity.shape[0] // n_models if size is None else size
    state = _Greedy(similarity, n_models, alpha, beta, size)
    merges = []
    for _ in range(similarity.shape[0] - size):
        i, j = state.best_pair()
        state.merge(i, j)
        merges.append((i, j))
    return merges


class _Greedy:
    """The features between two merges.

    Attributes:
        values: Similarities (Σn, Σn); entries of features that are gone mean nothing, nor does the diagonal.
        counts: Which features count as which model's, bool (N, Σn). At beta = 0 there is one more row, for a
            model of all single channels, whose budget is the groups that may still be started.
        origin: The lowest-numbered model of each channel, as counts; at beta > 0 it is what budgets are spent by.
        gone: Features that were merged into another one, bool (Σn,).
        waiting: Dead channels that are kept out, bool (Σn,).
        closed: Models without any budget left, bool (N,).
        bar: bar[m, c] is -inf where features of model m may not be merged with c, else 0; (N, Σn).
        bound: No allowed pair (r, c), r < c, has a higher similarity than bound[r]; (Σn,).
        partner: Where a row is not stale, the lowest c whose similarity is bound[r]; (Σn,).
        stale: Rows of which only the bound is known, bool (Σn,).
    """

    def __init__(self, similarity: Floats, n_models: int, alpha: float, beta: float, wanted: int) -> None:
        size = similarity.shape[0]
        n = size // n_models
        # Rows are eight longer in memory: at a stride of a power of two a column shares one cache set.
        self.values = np.empty((size, size + 8))[:, :size]
        self.values[:] = similarity
        self.alpha = alpha
        self.permutation = beta == 0
        self.budget = np.full(n_models, int((size - wanted) // n_models * beta + 1e-4))
        self.counts = np.repeat(np.eye(n_models, dtype=bool), n, axis=1)
        self.origin = self.counts.copy()
        if self.permutation:
            self.budget = np.append(self.budget, n)
            self.counts = np.vstack([self.counts, np.ones((1, size), dtype=bool)])
        else:
            self.budget = np.maximum(self.budget, 1)
        self.closed = self.budget == 0
        self.gone = np.zeros(size, dtype=bool)
        self.waiting = dead_channels(similarity)
        self._restart()

    def _restart(self) -> None:
        """Forget what is known of the rows; the bars are set anew."""
        absent = self.gone | self.waiting
        self.bar = np.where(absent | (self.closed[:, None] & self.counts), -np.inf, 0.0)
        self.bound = np.where(absent, -np.inf, np.inf)
        self.partner = np.zeros(len(absent), dtype=np.int64)
        self.stale = ~absent

    def best_pair(self) -> tuple[int, int]:
        """The allowed pair i < j of the highest similarity; ties go to the lowest i, then the lowest j."""
        while True:
            # The first row of the highest bound: where it is not stale, no lower row can tie with it.
            i = int(self.bound.argmax())
            if self.bound[i] == -np.inf:
                self._allow_more()
            elif self.stale[i]:
                self._settle(i, self.values[i, i + 1 :] + self._bar_of(i)[i + 1 :])
            else:
                return i, int(self.partner[i])

    def _allow_more(self) -> None:
        """Dead channels are let in; then, at beta > 0, features count as their lowest-numbered model's only."""
        # Then a pair is left while more than n features are: no model has more than n features of its own, and
        # at beta = 0 there is a single channel for each gap in the at most n started groups.
        if self.waiting.any():
            self.waiting[:] = False
        elif not self.permutation and (self.counts != self.origin).any():
            self.counts = self.origin.copy()
        else:  # fewer than n are to be left
            assert self.closed.any(), "no pair is left to merge"
            self.closed[:] = False
            self.budget[:] = len(self.gone)
        self._restart()

    def _bar_of(self, i: int) -> Floats:
        """What is added to feature i's similarities: -inf where a merge is forbidden, else 0; (Σn,)."""
        models = np.flatnonzero(self.counts[:, i])
        bar: Floats = self.bar[models[0]] if len(models) == 1 else self.bar[models].min(axis=0)
        return bar

    def _settle(self, i: int, scores: Floats) -> None:
        """Row i is known again, from its scores right of the diagonal."""
        self.stale[i] = False
        if len(scores) == 0:
            self.bound[i] = -np.inf
            return
        best = int(scores.argmax())
        self.partner[i], self.bound[i] = i + 1 + best, scores[best]

    def merge(self, i: int, j: int) -> None:
        """Feature j goes into feature i < j."""
        row = np.minimum(self.values[i], self.values[j])
        row *= self.alpha
        self.values[i] = row
        self.values[:, i] = row
        for model in np.flatnonzero(self.counts[:, i] & self.counts[:, j]).tolist():
            self._spend(model)
        self._join(i, j)
        self.gone[j] = True
        self.bar[:, j] = self.bound[j] = -np.inf
        row += self._bar_of(i)
        self._settle(i, row[i + 1 :])
        self._update_above(i, j, row[:i])
        self.stale[i + 1 : j] |= self.partner[i + 1 : j] == j

        if self.permutation and self.closed[-1] and self.budget[-1] > 0:  # pairs that were forbidden are not
            self.closed[-1] = False
            self._restart()

    def _join(self, i: int, j: int) -> None:
        """Feature i now counts as those of feature j's models that are closed; at beta = 0 as all of them."""
        if not self.permutation:
            self.counts[:, i] |= self.counts[:, j] & self.closed
        else:
            if not self.counts[-1, i] and not self.counts[-1, j]:
                self.budget[-1] += 1  # two started groups became one
            self.counts[:, i] |= self.counts[:, j]
            self.counts[-1, i] = False
        self.bar[:, i] = np.where(self.closed & self.counts[:, i], -np.inf, 0.0)

    def _spend(self, model: int) -> None:
        self.budget[model] -= 1
        if self.budget[model] == 0:
            self.closed[model] = True
            members = self.counts[model]
            self.bar[model, members] = -np.inf
            self.stale |= members & members[self.partner]

    def _update_above(self, i: int, j: int, scores: Floats) -> None:
        """Rows above i: column i has new scores (i,), column j is gone.

        Scores can rise too: a negative one does, times alpha. A row is known where its new score beats the
        bound; where it equals the bound, only if the row was known before.
        """
        bound, partner, stale = self.bound[:i], self.partner[:i], self.stale[:i]
        higher = scores > bound
        equal = (scores == bound) & ~stale & (partner >= i)
        lost = ((partner == i) | (partner == j)) & ~(higher | equal)
        stale[lost] = True
        stale[higher] = False
        bound[higher] = scores[higher]
        partner[higher | equal] = i
