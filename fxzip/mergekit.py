"""Recipes in mergekit's words, where these mean what fxzip does (https://github.com/arcee-ai/mergekit).

models:
- model: dogs.safetensors
- model: birds.safetensors
merge_method: linear
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxzip.errors import OptionError
from fxzip.settings import AUTO, MATCHING

_LINEAR = {"method": "average", "refit": False}
"""mergekit's mean of the weights, channels of one number together, and nothing solved for."""
_ELSEWHERE = {
    "base_model": "fxzip starts from no base: leave it out",
    "dtype": "fxzip merges in the precision of the checkpoints: leave it out, or change the saved network's",
    "tokenizer_source": "fxzip merges no tokenizers: leave it out",
    "slices": "fxzip merges whole networks, up to a `cut`: name them under `models`",
}


def translated(found: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options in fxzip's words.

    ``models`` are ``checkpoints``, ``images`` is ``limit``; ``merge_method`` is ``method``, and ``linear`` the plain
    ``average`` without refit.

    Raises:
        OptionError: Something means nothing in fxzip, or is said twice.
    """
    options = dict(found)
    if "images" in options:
        _once(options, "images", "limit")
        count = options["limit"] = options.pop("images")
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise OptionError(f"images={count!r}: it must be a whole number, 1 or more")
    if not {"models", "merge_method"} & set(options):
        return options
    for name, why in _ELSEWHERE.items():
        if options.get(name) is not None:
            raise OptionError(f"{name}: {why}")
    if options.pop("parameters", None) not in (None, {}, {"normalize": True}):
        raise OptionError("parameters: of mergekit's, fxzip knows `normalize: true` only; its own are `options`")
    if "models" in options:
        _once(options, "models", "checkpoints")
        options["checkpoints"] = _checkpoints(options.pop("models"))
    if "merge_method" in options:
        _once(options, "merge_method", "method")
        options = {**_method(options.pop("merge_method")), **options}
    return options


def _once(options: Mapping[str, Any], name: str, own: str) -> None:
    if own in options:
        raise OptionError(f"{name} and {own} mean the same: give one of them")


def _checkpoints(given: Any) -> list[str]:
    """The checkpoints of mergekit's list of models, all of one weight."""
    rows: list[Any] = given if isinstance(given, list) else [None]
    found, weights = [], []
    for given_row in rows:
        row: Any = {"model": given_row} if isinstance(given_row, str) else given_row
        if not isinstance(row, dict) or not isinstance(row.get("model"), str):
            raise OptionError("models: give a list of checkpoints, or of `model: CHECKPOINT`")
        own = row.get("parameters") or {}
        unknown = [name for name in (*row, *own) if name not in ("model", "parameters", "weight")]
        if unknown:
            raise OptionError(f"models: {unknown[0]} of {row['model']} means nothing in fxzip: leave it out")
        found.append(row["model"])
        weights.append(own.get("weight"))
    if any(weight != weights[0] for weight in weights):
        raise OptionError("models: the weights differ, and fxzip weighs all networks alike in their shared trunk")
    return found


def _method(name: Any) -> dict[str, Any]:
    if name == "linear":
        return dict(_LINEAR)
    if name != AUTO and name not in MATCHING:
        known = ", ".join(("linear", AUTO, *MATCHING))
        raise OptionError(f"merge_method: fxzip has no {name!r}; it has {known}")
    return {"method": name}
