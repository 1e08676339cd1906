"""The matchers: pure functions from a similarity matrix of channels to a merge map.

A similarity matrix holds the correlations of one channel space over N models of n channels each: shape
(Σn, Σn) with Σn = N · n, and rows ``[k * n : (k + 1) * n]`` are model k. It is taken as symmetric: only what
lies above the diagonal is read.

    merge_map = match("zip", similarity, n_models=2, alpha=0.3, beta=0.125)

To add a matcher, decorate a function ``(similarity, n_models, **options) -> assignment`` with
``@matcher("name")``: it is given a finite, symmetric float64 array and returns, for each of the Σn channels,
the merged channel (0 to n - 1) that it goes to, or a whole `MergeMap`. ``@matcher("name", of="covariance")`` is given
covariances. The options that it takes are declared there, too, and checked before anything is merged:

    @matcher("mine", options={"strength": Setting(0.5, "how far channels may move", low=0, high=1)})
    def mine(similarity, n_models, strength): ...

One that can leave any number of merged channels, not only n, says ``sized=True`` and takes that number as ``size``.

Dead channels (similarity 0 to every other channel, as zero variance gives) match last in every matcher.
"""

from fxzip.matching import assign as _assign
from fxzip.matching import cca as _cca
from fxzip.matching import greedy as _greedy
from fxzip.matching import pca as _pca
from fxzip.matching import selection as _selection
from fxzip.matching.greedy import zip_merges
from fxzip.matching.merge_map import MergeMap
from fxzip.matching.registry import (
    chosen_options,
    elsewhere,
    evidence,
    is_sized,
    match,
    matcher,
    methods,
    settings_of,
)
from fxzip.settings import Setting

del _assign, _cca, _greedy, _pca, _selection  # imported to register their matchers

__all__ = [
    "MergeMap",
    "Setting",
    "chosen_options",
    "elsewhere",
    "evidence",
    "is_sized",
    "match",
    "matcher",
    "methods",
    "settings_of",
    "zip_merges",
]
