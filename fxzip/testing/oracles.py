"""The oracles: permutation, mutation, self-zip and ensemble.

They show the rules as they are: `fxzip.passes.verify`, which keeps in place what a rule has wrong, is left out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fxzip.api import analyse, prepare
from fxzip.channels import ChannelSpec, Site
from fxzip.data.batches import given_inputs
from fxzip.passes.cut import Cut
from fxzip.passes.permute import permute, random_permutations
from fxzip.passes.trace.copies import eval_copy
from fxzip.testing.outputs import call, difference, in_type

TOLERANCE = 1e-9
"""The largest error of a network that is understood, as a share of the outputs' standard deviation, in float64."""


def permutation_error(
    model: nn.Module, inputs: Any, spec: ChannelSpec | None = None, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> float:
    """How far a copy is off in which the channels of all spaces are in a random order; a right analysis gives rounding.

    Args:
        model: The network; a copy in eval mode is used.
        inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        spec: The network's channel spaces; default: `fxzip.analyse` finds them.
        seed: Of the order.
        dtype: What the copy computes in; another one where an operation does not take float64.

    Returns:
        The largest difference of all outputs, as a share of the output's standard deviation.

    Raises:
        TraceError: The model cannot be traced.
        OptionError: The model gives no tensor.
    """
    model, inputs, spec = _given(model, inputs, spec, dtype)
    return difference(call(model, inputs), call(spec.permute(model, Generator().manual_seed(seed)), inputs))


def mutations_missed(
    model: nn.Module,
    inputs: Any,
    spec: ChannelSpec | None = None,
    *,
    most: int = 100,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float64,
) -> list[Site]:
    """The sites that may be left out of an analysis without a trace in `permutation_error`; there should be none.

    A site that is not noticed shows that the inputs or the weights are too special for the first oracle to mean
    anything. A parameter without any influence (a bias of keys, which the softmax cancels) is not counted.

    Args:
        model: The network; a copy in eval mode is used.
        inputs: As of `permutation_error`.
        spec: The network's channel spaces; default: `fxzip.analyse` finds them.
        most: How many sites are tried, each by itself, drawn at random.
        seed: Of the draw and of the orders.
        tolerance: The error that would be noticed.
        dtype: What the copy computes in.

    Returns:
        The sites that are missed, in the order of trying.

    Raises:
        TraceError: The model cannot be traced.
        OptionError: The model gives no tensor.
    """
    model, inputs, spec = _given(model, inputs, spec, dtype)
    if spec.folded and not isinstance(model, torch.fx.GraphModule):  # sites lie in the graph's weights, not the model's
        model = spec.permute(model, Generator().manual_seed(seed))
    expected = call(model, inputs)
    sites = [(i, j) for i, space in enumerate(spec.spaces) for j in range(len(space.sites)) if space.size > 1]
    chosen = torch.randperm(len(sites), generator=Generator().manual_seed(seed))[:most].tolist()
    missed = []
    for i, j in (sites[n] for n in chosen):
        space = spec.spaces[i]
        fewer = replace(space, sites=space.sites[:j] + space.sites[j + 1 :])
        mutant = replace(spec, spaces=(*spec.spaces[:i], fewer, *spec.spaces[i + 1 :]))
        outputs = call(permute(mutant, model, _moving(spec, space.name, seed)), inputs)
        unnoticed = difference(expected, outputs) < tolerance
        if unnoticed and difference(expected, call(_disturbed(model, space.sites[j]), inputs)) >= tolerance:
            missed.append(space.sites[j])
    return missed


def self_zip_errors(
    model: nn.Module,
    inputs: Any,
    spec: ChannelSpec | None = None,
    *,
    cuts: Iterable[Cut] | None = None,
    methods: Sequence[str] = ("permute",),
    step: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[Cut, float]:
    """How far merges of a network with a permuted copy of itself are off: by the paper's rule both heads are it again.

    The cut ``0.0`` is the empty trunk, which is the ensemble of both networks, whatever was found.

    Args:
        model: The network; a copy in eval mode is used.
        inputs: As of `permutation_error`. The networks are observed on them, so there must be enough to tell
            channels apart.
        spec: The network's channel spaces; default: `fxzip.analyse` finds them.
        cuts: As of `fxzip.zip`; default: every valid one.
        methods: Matchers, as of `fxzip.zip`.
        step: Of the valid cuts each so many-th is taken, where no cuts are given.
        dtype: What the copy computes in.

    Returns:
        For each cut the largest difference of either head and all methods, as a share of the standard deviation.

    Raises:
        TraceError, AlignmentError, CutError, CalibrationError, OptionError: see `fxzip.errors`.
    """
    model, inputs, spec = _given(model, inputs, spec, dtype)
    moved = spec.permute(model, Generator().manual_seed(2))
    own, other = call(model, inputs), call(moved, inputs)
    prepared = prepare(model, moved, example_inputs=inputs, verify=False)
    del moved  # copies of large models are scarce in memory
    prepared.observe([_as_batch(model, inputs)], hold_back=False, progress=False)
    chosen = prepared.cuts[::step] if cuts is None else tuple(cuts)
    errors: dict[Cut, float] = {}
    for cut in sorted(chosen, key=lambda cut: cut == 0.0):
        empty = cut == 0.0
        if empty:  # the last: it needs no map, and twice the memory for weights
            prepared.moments.clear()
        for method in methods[:1] if empty else methods:
            # no merges within a network, which would not be exact
            options: dict[str, Any] = {"beta": 0.0} if method == "zip" else {}
            merged = prepared.convert(
                cut=cut, method=method, refit=False, reset_batch_norm=False, verify=False, progress=False, **options
            )
            error = difference((own, other if empty else own), call(merged, inputs))
            errors[cut] = max(error, errors.get(cut, 0.0))
            del merged
    return errors


def ensemble_error(model: nn.Module, inputs: Any, spec: ChannelSpec | None = None) -> float:
    """How far a merge with an empty trunk is off from both networks by themselves; it must be 0, exactly.

    Args:
        model: The network; the other one is a permuted copy.
        inputs: As of `permutation_error`.
        spec: The network's channel spaces; default: `fxzip.analyse` finds them.

    Returns:
        The largest difference, as a share of the outputs' standard deviation.

    Raises:
        TraceError, AlignmentError, CalibrationError, OptionError: see `fxzip.errors`.
    """
    return self_zip_errors(model, inputs, spec, cuts=(0.0,))[0.0]


def _given(
    model: nn.Module, inputs: Any, spec: ChannelSpec | None, dtype: torch.dtype
) -> tuple[nn.Module, Any, ChannelSpec]:
    """The model and its inputs in a number type, and its spaces; the very model where it needs no copy."""
    numbers = [tensor for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_floating_point()]
    if model.training or any(tensor.dtype != dtype for tensor in numbers):
        model = eval_copy(model).to(dtype)
    inputs = in_type(inputs, dtype)
    return model, inputs, analyse(model, inputs, verify=False) if spec is None else spec


def _as_batch(model: nn.Module, inputs: Any) -> Any:
    """Inputs as a loader gives them: several positional ones by their names, since what follows an input is a label."""
    args, kwargs = given_inputs(inputs)
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments if len(args) > 1 else inputs


def _moving(spec: ChannelSpec, name: str, seed: int) -> dict[str, Tensor]:
    """Random permutations that move the channels of one space, which has several, for certain."""
    tried = (random_permutations(spec, Generator().manual_seed(again)) for again in itertools.count(seed))
    return next(orders for orders in tried if not torch.equal(orders[name], torch.arange(spec[name].size)))


def _disturbed(model: nn.Module, site: Site) -> nn.Module:
    """A copy with other values, by much, where a site lies."""
    changed = copy.deepcopy(model)
    tensor = changed.state_dict(keep_vars=True)[site.parameter]
    with torch.no_grad():
        here = site.index.flatten().unique()
        part = tensor.index_select(site.axis, here)
        noise = torch.rand(part.shape, generator=Generator().manual_seed(0), dtype=part.dtype)
        tensor.index_copy_(site.axis, here, part * (0.5 + noise) + 0.5 * noise)
    return changed
