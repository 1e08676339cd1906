"""The registry of matchers, and `match`, which calls one by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy.typing as npt
from torch import Tensor

from fxzip.errors import OptionError
from fxzip.matching.merge_map import MergeMap
from fxzip.matching.similarity import Ints, as_similarity
from fxzip.settings import Setting

Matcher: TypeAlias = Callable[..., Ints | MergeMap]
Registered = TypeVar("Registered", bound=Matcher)
Evidence = Literal["correlation", "covariance", "weights"]


@dataclass(frozen=True)
class Entry:
    """A matcher as it was registered; the attributes are what `matcher` takes."""

    function: Matcher
    of: Evidence
    options: Mapping[str, Setting]
    sized: bool
    elsewhere: str | None


_MATCHERS: dict[str, Entry] = {}


def matcher(
    name: str, of: Evidence = "correlation", options: Mapping[str, Setting] | None = None, sized: bool = False,
    elsewhere: str | None = None,
) -> Callable[[Registered], Registered]:  # fmt: skip
    """Registers a matcher under a name.

    Args:
        name: What users call it by.
        of: The kind of matrix that it takes: correlations, covariances, or similarities of weights.
        options: The options that it takes, by name: it is called with all of them.
        sized: Whether it gives as many merged channels as it is asked for, by a keyword ``size``; else it is one
            model's number.
        elsewhere: Where maps are not of single channels, and so exact only in linear spaces (`ChannelSpace.linear`):
            the matcher for all other spaces, which takes the same options.

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Registered) -> Registered:
        if name in _MATCHERS:
            raise ValueError(f"matcher {name!r} is registered already: {_MATCHERS[name].function.__qualname__}")
        _MATCHERS[name] = Entry(function, of, dict(options or {}), sized, elsewhere)
        return function

    return register


def unregister(name: str) -> None:
    """Forget a matcher; KeyError where there is none of that name."""
    del _MATCHERS[name]


def evidence(method: str) -> Evidence:
    """Whether a matcher takes correlations, covariances, or how alike the weights are.

    Raises:
        OptionError: No matcher has that name.
    """
    return _find(method).of


def methods() -> tuple[str, ...]:
    """The names of all matchers."""
    return tuple(_MATCHERS)


def is_sized(method: str) -> bool:
    """Whether a matcher gives as many merged channels as it is asked for.

    Raises:
        OptionError: No matcher has that name.
    """
    return _find(method).sized


def elsewhere(method: str) -> str | None:
    """The matcher in the place of one that is for linear spaces only, in all others; None: it is for all.

    Raises:
        OptionError: No matcher has that name.
    """
    return _find(method).elsewhere


def settings_of(method: str) -> dict[str, Setting]:
    """The options that a matcher takes, by name.

    Raises:
        OptionError: No matcher has that name.
    """
    return dict(_find(method).options)


def chosen_options(method: str, given: Mapping[str, object]) -> dict[str, Any]:
    """All options of a matcher: those that are given, checked, and the defaults of the others.

    Raises:
        OptionError: The method is unknown or does not take an option, or an option is out of range.
    """
    known = settings_of(method)
    for name in given:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise OptionError(f"method {method!r} has no option {name!r}: it takes {takes}")
    return {
        name: setting.check(name, given[name]) if name in given else setting.default for name, setting in known.items()
    }


def match(
    method: str, similarity: Tensor | npt.ArrayLike, n_models: int = 2, size: int | None = None, **chosen: Any
) -> MergeMap:
    """Matches the channels of N models by their similarity.

    Args:
        method: ``average``, ``permute``, ``zip``, ``optimal``, ``select`` or any other registered name.
        similarity: Correlations, or the kind of matrix that `evidence` names, of shape (Σn, Σn) with Σn = N · n; rows
            ``[k * n : (k + 1) * n]`` are model k.
        n_models: N.
        size: The number of merged channels, 1 to Σn; None: n.
        **chosen: The method's options; `settings_of` lists them.

    Raises:
        OptionError: The method is unknown, does not take an option or not this size, an option is out of range, the
            similarity is not square, does not divide by N or is not finite, or N is less than one.
    """
    entry, options = _find(method), chosen_options(method, chosen)
    values = as_similarity(similarity, n_models)
    total, n = len(values), len(values) // n_models
    wanted = n if size is None else size
    if not 1 <= wanted <= total:
        raise OptionError(f"{total} channels cannot be merged into {wanted}: give a size of 1 to {total}")
    if entry.sized:
        options["size"] = wanted
    elif wanted != n:
        raise OptionError(
            f"method {method!r} merges {n_models} times {n} channels into {n}, not into {wanted}; other widths take "
            f"{' or '.join(repr(name) for name, found in sorted(_MATCHERS.items()) if found.sized)}"
        )
    found = entry.function(values, n_models, **options)
    merged = found if isinstance(found, MergeMap) else MergeMap.from_assignment(found, n_models)
    if merged.size != wanted:
        raise OptionError(f"method {method!r} merged {total} channels into {merged.size}, not into {wanted}")
    return merged


def _find(method: str) -> Entry:
    if isinstance(method, str) and method in _MATCHERS:
        return _MATCHERS[method]
    near = difflib.get_close_matches(str(method), _MATCHERS) or sorted(_MATCHERS)
    raise OptionError(f"unknown matching method {method!r}; did you mean {', '.join(map(repr, near))}?")
