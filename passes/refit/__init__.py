"""Refit: closed-form least squares of the merged weights, layer by layer, on the merged network's own inputs."""

from fxzip.passes.refit.refit import refit, refit_rest
from fxzip.settings import RefitOptions

__all__ = ["RefitOptions", "refit", "refit_rest"]
