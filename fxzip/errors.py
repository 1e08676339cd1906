"""What fxzip raises: one class for each thing that a caller can put right."""


class FxzipError(Exception):
    """Base of all errors that fxzip raises on purpose."""


class TraceError(FxzipError, RuntimeError):
    """A model could not be turned into a graph, or the graph computes something else than the model."""


class AlignmentError(FxzipError, ValueError):
    """The models do not share enough structure to be merged."""


class CutError(FxzipError, ValueError):
    """The cut is unknown, or no trunk would be left before it."""


class CalibrationError(FxzipError, ValueError):
    """The loader gave nothing, the wrong thing, or data on which the models are not finite."""


class OptionError(FxzipError, ValueError):
    """An option is unknown or out of range."""


class VerificationError(FxzipError, RuntimeError):
    """A merge that must be exact is not: fxzip misread the network, and stops rather than give a wrong result."""


class SaveError(FxzipError, RuntimeError):
    """The merged network cannot be saved, or not at the given path."""


class CheckpointError(FxzipError, ValueError):
    """A checkpoint is missing, cannot be read, or is of another architecture."""


class FileFormatError(FxzipError, ValueError):
    """A saved network is missing, cut short, altered, too new, or asks for what a saved network may not do."""


class ExportError(FxzipError, RuntimeError):
    """The merged network could not be exported, or what was exported computes something else."""


class RestoreError(FxzipError, RuntimeError):
    """The merged weights cannot be put back into the models' own classes."""


class ProcessError(FxzipError, RuntimeError):
    """Another process of a shared merge has ended, does not answer, or does something else."""


class RuleError(FxzipError, AssertionError):
    """One of fxzip's own rules failed on a node: a bug in fxzip, please report it."""


class FrozenSpaceWarning(UserWarning):
    """An operation that fxzip does not know froze the channel spaces that it touches."""


class FewImagesWarning(UserWarning):
    """There are too few images to determine all weights of a layer: the rest keep their values from before the fit."""


class LowFidelityWarning(UserWarning):
    """The merged network often answers otherwise than its parents do."""


class PreparationWarning(UserWarning):
    """The models that are merged were trained on images that were prepared otherwise."""


class WidthWarning(UserWarning):
    """Networks of different widths cannot be brought to the same ones, and are merged up to where they differ."""


class DroppedInputWarning(UserWarning):
    """A loader's batches hold labels, which are not inputs of the models and are left out."""
