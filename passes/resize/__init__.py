"""Resize: a network's graph with other numbers of channels in its spaces."""

from fxzip.passes.resize.resize import Resized, ResizeError, resize

__all__ = ["ResizeError", "Resized", "resize"]
