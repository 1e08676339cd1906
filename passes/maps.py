"""The maps of the spaces that are merged, from activations or from weights, as the method wants it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fxzip.channels import ChannelSpec
from fxzip.matching import MergeMap, evidence
from fxzip.moments import Moments
from fxzip.passes.align import Alignment
from fxzip.passes.match import match_spaces
from fxzip.passes.match_weights import match_by_weights


def find_maps(
    spec: ChannelSpec,
    alignment: Alignment,
    moments: Mapping[str, Moments],
    names: Collection[str],
    method: str,
    options: Mapping[str, Any],
    images: int,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, MergeMap]:
    """The merge map of each of the named spaces, from whatever the method judges by.

    Args:
        spec: The channel spaces.
        alignment: The networks.
        moments: What was observed, by space.
        names: The spaces.
        method: As for `fxzip.matching.match`.
        options: Of the method.
        images: How many images were observed: that is how many samples are independent.
        sizes: As of `fxzip.passes.match.match_spaces`.
    """  # fmt: skip
    if options.get("samples", images) is None:
        options = {**options, "samples": images}
    if evidence(method) != "weights":
        return match_spaces(spec, moments, method, len(alignment.modules), names, sizes, **options)
    peers = alignment.peers(len(alignment.shared))
    whole = [module.state_dict() for module in alignment.modules]
    states = [{name: state[own[k]] for name, own in peers.items()} for k, state in enumerate(whole)]
    gamma = options.get("gamma", 0.0)
    seen = {name: found.correlation.cpu() for name, found in moments.items()} if gamma else {}
    return match_by_weights(spec, states, names, seen, gamma)
