"""Verify: every merge is checked before it is fitted (translation validation)."""

from fxzip.passes.verify.freeze import without_spaces
from fxzip.passes.verify.verify import Verifier, ensemble_error
from fxzip.passes.verify.widths import fixed_sizes, width_error

__all__ = ["Verifier", "ensemble_error", "fixed_sizes", "width_error", "without_spaces"]
