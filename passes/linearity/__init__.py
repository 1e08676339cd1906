"""Linearity: which channel spaces any orthogonal map leaves as they are; see `fxzip.passes.linearity.linearity`."""

from fxzip.passes.linearity.linearity import linearity

__all__ = ["linearity"]
