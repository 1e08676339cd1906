"""Align: several models' graphs are walked side by side, up to where they diverge."""

from fxzip.passes.align.align import Alignment, align

__all__ = ["Alignment", "align"]
