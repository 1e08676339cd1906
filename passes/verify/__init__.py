"""Verify: every merge is checked before it is fitted (translation validation)."""

from fxzip.passes.verify.freeze import without_spaces
from fxzip.passes.verify.verify import Verifier, ensemble_error

__all__ = ["Verifier", "ensemble_error", "without_spaces"]
