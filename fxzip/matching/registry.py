"""The registry of matchers, and `match`, which calls one by its name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from numbers import Real
from typing import Literal, TypeAlias, TypeVar

import numpy.typing as npt
from torch import Tensor

from fxzip.errors import OptionError
from fxzip.matching.merge_map import MergeMap
from fxzip.matching.similarity import Ints, as_similarity

Matcher: TypeAlias = Callable[..., Ints | MergeMap]
Registered = TypeVar("Registered", bound=Matcher)
Evidence = Literal["correlation", "covariance", "weights"]
_MATCHERS: dict[str, Matcher] = {}
_EVIDENCE: dict[str, Evidence] = {}


def matcher(name: str, of: Evidence = "correlation") -> Callable[[Registered], Registered]:
    """Registers a matcher under a name, and what it wants to be given; a taken name raises ValueError."""

    def register(function: Registered) -> Registered:
        if name in _MATCHERS:
            raise ValueError(f"matcher {name!r} is registered already: {_MATCHERS[name].__qualname__}")
        _MATCHERS[name], _EVIDENCE[name] = function, of
        return function

    return register


def evidence(method: str) -> Evidence:
    """Whether a matcher takes correlations, covariances, or how alike the weights are.

    Raises:
        OptionError: No matcher has that name.
    """
    _find(method)
    return _EVIDENCE[method]


def methods() -> tuple[str, ...]:
    """The names of all matchers."""
    return tuple(_MATCHERS)


def options(method: str) -> dict[str, float]:
    """The options that a matcher takes, with their defaults.

    Raises:
        OptionError: No matcher has that name.
    """
    parameters = list(inspect.signature(_find(method)).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}


def match(method: str, similarity: Tensor | npt.ArrayLike, n_models: int = 2, **chosen: float) -> MergeMap:
    """Matches the channels of N models by their similarity.

    Args:
        method: ``average``, ``permute``, ``zip``, ``optimal``, ``select`` or any other registered name.
        similarity: Correlations, or what else `evidence` says, shape (Σn, Σn) with Σn = N · n; rows
            ``[k * n : (k + 1) * n]`` are model k.
        n_models: N.
        **chosen: The method's options; ``zip`` takes ``alpha`` and ``beta``, both in [0, 1].

    Raises:
        OptionError: The method is unknown or does not take an option, an option is out of range, the
            similarity is not square, does not divide by N or is not finite, or N is less than one.
    """
    function, known = _find(method), options(method)
    for name, value in chosen.items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise OptionError(f"method {method!r} has no option {name!r}: {takes}")
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise OptionError(f"{name} must be a number in [0, 1], got {value!r}")
    values = as_similarity(similarity, n_models)
    found = function(values, n_models, **chosen)
    return found if isinstance(found, MergeMap) else MergeMap.from_assignment(found, n_models)


def _find(method: str) -> Matcher:
    if method in _MATCHERS:
        return _MATCHERS[method]
    near = difflib.get_close_matches(str(method), _MATCHERS) or sorted(_MATCHERS)
    raise OptionError(f"unknown matching method {method!r}; did you mean {', '.join(map(repr, near))}?")
