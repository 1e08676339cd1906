"""Align: several models' graphs are walked side by side, up to where they part."""

from fxzip.passes.align.align import Alignment, align

__all__ = ["Alignment", "align"]
