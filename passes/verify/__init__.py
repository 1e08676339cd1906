"""Verify: every merge is checked before it is fitted (translation validation)."""

from fxzip.passes.verify.freeze import without_spaces
from fxzip.passes.verify.verify import Verified, Verifier, ensemble_error

__all__ = ["Verified", "Verifier", "ensemble_error", "without_spaces"]
