"""Checks of what a user gave, before anything is traced, observed or read."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxzip.channels import NOT_ASKED, ChannelSpec
from fxzip.data.bars import Bar
from fxzip.data.checks import check_order
from fxzip.errors import AlignmentError, OptionError
from fxzip.joint import Heads, check_heads
from fxzip.matching import chosen_options, elsewhere, is_sized, match, settings_of
from fxzip.names import bad_name
from fxzip.passes.cut import check_span, parse_budget, parse_fidelity
from fxzip.passes.points import check_points
from fxzip.settings import AUTO, EACH, EFFORTS, MATCHING, RefitOptions, refit_settings
from fxzip.widths import parse_widths


@dataclass(frozen=True)
class Choice:
    """How to merge, as a user chose it and as it was checked.

    Attributes:
        method: The matcher.
        options: All of its options.
        refit: How to refit; None: the paper's rule.
        heads: A head for each task, or one for all (`fxzip.joint`).
    """

    method: str
    options: Mapping[str, float | None]
    refit: RefitOptions | None
    heads: Heads = EACH

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={value:g}" for key, value in self.options.items() if value is not None)
        return f"{self.method}({shown})" if shown else self.method


def check_merge(call: Callable[..., Any], n_models: int, /, **given: Any) -> Choice:
    """Check the arguments of a merge, and sort them into the method's options and those of refit.

    Args:
        call: What the user called, `fxzip.zip` or `Prepared.convert`: it says which arguments there are; all others
            are options of the method.
        n_models: How many models are merged.
        given: Its keyword arguments; those that are left out have their defaults.

    Raises:
        CutError: The cut or the start would not be valid in any network.
        OptionError: An argument is unknown, of the wrong kind or out of range.
    """
    own = {p.name: p.default for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY}
    options = {name: value for name, value in given.items() if name not in own}
    values = {**own, **given}
    check_span(values["cut"], values["start"])
    check_points(values.get("points", "last"))
    check_widths(values)
    heads = values.get("heads", EACH)
    check_heads(heads)
    for flag in {"hold_back", "reset_batch_norm", "verify"} & values.keys():
        check_flag(flag, values[flag])
    check_progress(values["progress"])
    for name, value in options.items():
        _check_known(name, value, call.__name__, list(own), values["method"])
    method = values["method"]
    refit = refit_options(values["refit"], values["effort"])
    return Choice(method, check_method(method, options, n_models), refit, heads)


def check_widths(values: Mapping[str, Any]) -> None:
    """Raise what is wrong with the width or the budget of a merge in any network."""
    widths = parse_widths(values.get("width"), values.get("budget"))
    if widths is None:
        return
    if parse_budget(values["cut"]) is not None or parse_fidelity(values["cut"]) is not None:
        raise OptionError(f"cut={values['cut']!r} and a width or a budget: a cut by its cost takes one network's width")
    method = values["method"]
    if method != AUTO and not is_sized(method):
        raise OptionError(f"method={method!r} leaves one network's width; other widths take 'select', 'zip' or 'auto'")


def _check_known(name: str, value: object, call: str, arguments: Sequence[str], method: str) -> None:
    """Raise OptionError unless an argument is an option of the method."""
    known = {} if method == AUTO else settings_of(method)
    if name in known:
        return
    if method == AUTO:
        _refuse_for_auto([name])
    if name in refit_settings():
        raise OptionError(f"{name!r} is a setting of refit: give refit=fxzip.RefitOptions({name}={value!r})")
    others = [other for settings in MATCHING.values() for other in settings] if method == AUTO else []
    near = difflib.get_close_matches(name, [*known, *arguments, *refit_settings(), *others])
    takes = f"which takes {', '.join(known) or 'none'}" + (f"; did you mean {', '.join(near)}?" if near else "")
    raise OptionError(
        f"unknown argument {name!r}; it is neither an argument of {call}() nor an option of method {method!r}, {takes}"
    )


def _refuse_for_auto(given: Iterable[str]) -> None:
    """Raise OptionError where an option is one of a method that is tried: these are tried with their defaults."""
    for name in given:
        takers = [method for method, settings in MATCHING.items() if name in settings]
        if takers:
            raise OptionError(f"{name!r} is an option of method {takers[0]!r}: give method={takers[0]!r} with it")


def check_method(method: str, given: Mapping[str, Any], n_models: int) -> dict[str, Any]:
    """All options to call a matcher with: what is given, and the defaults of the others.

    Raises:
        OptionError: The method is unknown or does not take so many models, or an option is out of range or not
            one of its own.
    """
    if method == AUTO:
        _refuse_for_auto(given)
        return {}
    chosen = chosen_options(method, given)
    match(method, torch.eye(n_models), n_models=n_models, **chosen)
    return chosen


def needs_linear(method: str) -> bool:
    """Whether a matcher is for linear spaces only, and networks are to be written so that they have some."""
    return method != AUTO and elsewhere(method) is not None


def check_linear(method: str, spec: ChannelSpec) -> None:
    """Raise where a matcher is for linear spaces only and there is none.

    Raises:
        OptionError: There is none, or the networks were not written so that it would be exact.
    """
    if not needs_linear(method) or any(space.linear for space in spec.spaces):
        return
    widest = max(spec.spaces, key=lambda space: len(space.sites), default=None)
    if widest is not None and widest.bent == NOT_ASKED:
        raise OptionError(f"method {method!r} needs networks prepared by fxzip.prepare(..., linearise=True)")
    why = "" if widest is None else f", for one not {widest.name}: {widest.bent}"
    raise OptionError(
        f"method {method!r} is for channel spaces that any orthogonal map leaves as they are (fxzip.analyse calls them "
        f"linear), and here none is{why}; take {elsewhere(method)!r}"
    )


def refit_options(refit: object, effort: object = "default") -> RefitOptions | None:
    """How to refit, from what a user gave; None: not at all.

    Raises:
        OptionError: It is neither a bool nor `RefitOptions`, the effort is unknown, or both are given.
    """
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise OptionError(f"effort={effort!r}: it must be one of {', '.join(map(repr, EFFORTS))}")
    if isinstance(refit, RefitOptions):
        if EFFORTS[effort]:
            raise OptionError(f"effort={effort!r} sets what refit=fxzip.RefitOptions(...) does: give one of them")
        return refit
    if not isinstance(refit, bool):
        raise OptionError(f"refit={refit!r}: give True, False, or fxzip.RefitOptions(...) for other settings")
    return RefitOptions(**EFFORTS[effort]) if refit else None


def check_flag(name: str, value: object) -> None:
    """Raise OptionError unless a value is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: give True or False")


def check_progress(value: object) -> None:
    """Raise OptionError unless progress can be shown so: a bar is what fxzip gives itself."""
    if not isinstance(value, Bar):
        check_flag("progress", value)


def device_named(given: torch.device | str | None) -> torch.device | None:
    """The device of a name, which must be there; None where none is given.

    Raises:
        OptionError: There is no such device here.
    """
    if given is None:
        return None
    try:
        torch.zeros(1, device=given, dtype=torch.float64).add_(1)
        return torch.device(given)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"stats_device={str(given)!r} cannot keep sums in float64: {reason}") from error


def check_models(models: Sequence[Any], least: int = 2) -> None:
    """Raise unless the models are so many modules or more, each of them on one device and all on the same."""
    for number, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise OptionError(f"model {number} is a {type(model).__name__}, not a torch.nn.Module")
    if len(models) < least:
        raise OptionError(f"{len(models)} model given: merging takes two models or more")
    devices = [{p.device for p in (*model.parameters(), *model.buffers())} for model in models]
    for number, found in enumerate(devices):
        if len(found) > 1:
            raise AlignmentError(
                f"model {number} is spread over several devices, move it to one: {', '.join(sorted(map(str, found)))}"
            )
        if found != devices[0] and found and devices[0]:
            ours, peers = found.pop(), devices[0].pop()
            raise AlignmentError(f"model {number} is on {ours}, model 0 is on {peers}; move them to one device")


def task_names(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    """The tasks' names: the given ones, or task0, task1 ..."""
    if names is None:
        return tuple(f"task{number}" for number in range(count))
    found = (names,) if isinstance(names, str) else tuple(names)
    if len(found) != count or len(set(found)) != count:
        raise OptionError(f"names={found}: give one name for each of the {count} models, all different")
    wrong = bad_name(found)
    if wrong is not None:
        raise OptionError(wrong)
    return found


def models_and_loader(given: tuple[Any, ...], loader: Any) -> tuple[tuple[Any, ...], Any]:
    """The models and the loader, which may be the last of the positional arguments.

    Raises:
        OptionError: There is no loader.
    """
    if loader is not None:
        return given, loader
    if not given or isinstance(given[-1], nn.Module):
        check_order(given)
        raise OptionError("no loader: call fxzip.zip(model_a, model_b, loader)")
    return given[:-1], given[-1]
