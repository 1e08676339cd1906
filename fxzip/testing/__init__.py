"""Exact oracles for people who write rules: what fxzip found in a network is held against what the network computes.

    model = fxzip.testing.randomise(Small(), images)
    assert fxzip.testing.permutation_error(model, images) < fxzip.testing.TOLERANCE
    assert fxzip.testing.mutations_missed(model, images) == []
    assert max(fxzip.testing.self_zip_errors(model, images).values()) < fxzip.testing.TOLERANCE

All of them compute in float64, so that what is left is rounding, some 1e-14: a larger error is a fault, no matter how
small it looks. Take a small network with random values (`randomise`). A network's values as it begins hide faults: a
scale of 1e-6 makes a branch vanish, and gammas of one are the same in any order. Models are left as they are.
"""

from fxzip.testing.networks import images, randomise
from fxzip.testing.oracles import TOLERANCE, ensemble_error, mutations_missed, permutation_error, self_zip_errors
from fxzip.testing.outputs import call, difference
from fxzip.testing.rotation import rotation_error
from fxzip.testing.widths import dropping_error, padding_error

__all__ = [
    "TOLERANCE",
    "call",
    "difference",
    "dropping_error",
    "ensemble_error",
    "images",
    "mutations_missed",
    "padding_error",
    "permutation_error",
    "randomise",
    "rotation_error",
    "self_zip_errors",
]
