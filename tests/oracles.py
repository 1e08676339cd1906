"""The public oracles (`fxzip.testing`), and what else the tests look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxzip.testing import (
    TOLERANCE,
    call,
    difference,
    images,
    mutations_missed,
    permutation_error,
    randomise,
    self_zip_errors,
)

__all__ = [
    "TOLERANCE",
    "call",
    "difference",
    "images",
    "mutations_missed",
    "permutation_error",
    "randomise",
    "recorded",
    "self_zip_errors",
]


def recorded(module: fx.GraphModule, *args: Any) -> dict[str, Any]:
    """What each node of a graph gives, by name; copies, since a later node may write into it."""
    values: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n.name] = result.clone() if isinstance(result, Tensor) else result
            return result

    with torch.no_grad():
        Recorder(module).run(*args)
    return values
