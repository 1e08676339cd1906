"""What fxzip raises: one class for each thing that a caller can put right."""


class FxzipError(Exception):
    """Base of all errors that fxzip raises on purpose."""


class TraceError(FxzipError, RuntimeError):
    """A model could not be turned into a graph, or its graph computes something else."""


class AlignmentError(FxzipError, ValueError):
    """The models do not share enough structure to be merged."""


class CutError(FxzipError, ValueError):
    """The cut is unknown, or no trunk would be left before it."""


class CalibrationError(FxzipError, ValueError):
    """The loader gave nothing, the wrong thing, or data on which the models are not finite."""


class OptionError(FxzipError, ValueError):
    """An option is unknown or out of range."""


class FrozenSpaceWarning(UserWarning):
    """An operation that fxzip does not know froze the channel spaces that it touches."""
