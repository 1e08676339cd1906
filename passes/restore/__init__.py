"""Restore: the weights of a merged network under the names that a parent's own module has for them."""

from fxzip.passes.restore.restore import restore
from fxzip.passes.restore.values import Values

__all__ = ["Values", "restore"]
