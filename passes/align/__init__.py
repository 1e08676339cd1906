"""Align: several models' graphs are walked side by side, up to where they diverge."""

from fxzip.passes.align.align import Alignment, align
from fxzip.passes.align.differences import own_tensors

__all__ = ["Alignment", "align", "own_tensors"]
