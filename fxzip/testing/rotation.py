"""The oracle of linear spaces: turned by any orthogonal maps, the network computes what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from fxzip.data.batches import given_inputs
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.linearise import linearise
from fxzip.passes.rotate import random_rotations, rotate
from fxzip.passes.trace import trace
from fxzip.passes.trace.copies import eval_copy
from fxzip.testing.outputs import call, difference, in_type


def rotation_error(
    model: nn.Module, inputs: Any, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """How far a copy is off in which linear spaces (`ChannelSpace.linear`) are turned by random orthogonal maps.

    Norms over them are written without scales, LayerNorms as RMSNorms; channels in blocks (the values of an attention's
    heads) are turned inside each block.

    Args:
        model: The network; a copy in eval mode is used.
        inputs: As of `permutation_error`.
        seed: Of the maps.
        dtype: As of `permutation_error`.

    Returns:
        The largest difference of all outputs, as a share of the output's standard deviation, by linear space, each
        turned alone; under the name ``""`` with all of them turned at once, or as they were written if there are none.

    Raises:
        TraceError: The model cannot be traced.
        OptionError: The model gives no tensor.
    """
    model, inputs = eval_copy(model).to(dtype), in_type(inputs, dtype)
    args, kwargs = given_inputs(inputs)
    expected = call(model, inputs)
    traced = canonicalise(trace(model, args, kwargs))
    module, spec = linearise(traced, analyse_graph(traced, args, kwargs))
    maps = random_rotations(spec, Generator().manual_seed(seed))
    some = {"": maps} | {name: {name: matrix} for name, matrix in maps.items()}
    return {name: difference(expected, call(rotate(spec, module, each), inputs)) for name, each in some.items()}
