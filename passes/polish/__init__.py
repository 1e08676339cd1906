"""Polish: damped Gauss-Newton steps of all layers together, on the heads' outputs."""

from fxzip.passes.polish.polish import polish

__all__ = ["polish"]
