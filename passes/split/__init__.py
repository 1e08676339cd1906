"""Split: one shared trunk up to the cut, with merged weights, and each model's own rest as a head."""

from fxzip.passes.split.split import Split, split

__all__ = ["Split", "split"]
