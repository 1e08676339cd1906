"""Linearity: which channel spaces are read and written by linear maps alone: any orthogonal map of them is exact.

A permutation of channels is exact at whatever acts on each of them alike. Where nothing bends them, between the weights
that write them and those that read them, any orthogonal matrix Q is: W becomes Q W where it writes, and W Qᵀ where it
reads (SliceGPT, arXiv 2401.15024). A node may

- move vectors of channels as they are, add them up, multiply them by numbers that are the same for all channels;
- divide them by their root mean square (RMSNorm). A LayerNorm is an RMSNorm of what is centred already, so all that
  writes is centred; then nothing else may read what has not been centred;
- scale and shift each channel, if all that reads the result is a layer that takes both into its weights, or if it
  stands behind the layer that writes, which takes them.

What a node does is what the rule of its operation says (``linear``, ``norm``, ``joint``).
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxzip.channels import ChannelSpec
from fxzip.passes.linearity.follow import Follower, Linearity


def linearity(module: fx.GraphModule, spec: ChannelSpec) -> ChannelSpec:
    """The spec, its spaces with the reason why they are not linear, or none.

    Args:
        module: The network that was analysed; it stays as it is.
        spec: Its channel spaces.
    """
    bent = find_linearity(module, spec).bent
    spaces = tuple(replace(space, bent=bent.get(number)) for number, space in enumerate(spec.spaces))
    return replace(spec, spaces=spaces)


def find_linearity(module: fx.GraphModule, spec: ChannelSpec) -> Linearity:
    """Follow every space through the graph."""
    found = Follower(module, spec).run()
    for number, norm in found.centring.items():
        if number in found.raw:
            found.bent.setdefault(
                number, f"{norm} subtracts the mean, and {found.raw[number]} reads what it is taken from"
            )
    for number, space in enumerate(spec.spaces):
        if spec.children(space.name):
            found.bent[number] = "its channels are blocks of others"
        elif any(site.rows is not None for site in space.sites):
            found.bent.setdefault(number, "a grouped layer reads or writes it")
    return found
