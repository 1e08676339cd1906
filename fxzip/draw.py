"""Drawings of a merged network: the public path of `fxzip.views.draw`."""

from fxzip.views.draw import draw

__all__ = ["draw"]
