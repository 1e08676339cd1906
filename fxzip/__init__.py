"""Merge trained networks of one architecture into one with a shared trunk and a head per task, without training.

zipped = fxzip.zip(model_a, model_b, loader)
logits_a, logits_b = zipped(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxzip.api import analyse, prepare, zip
    from fxzip.channels import ChannelSpace, ChannelSpec
    from fxzip.errors import (
        AlignmentError,
        CalibrationError,
        CheckpointError,
        CutError,
        DroppedInputWarning,
        ExportError,
        FewImagesWarning,
        FileFormatError,
        FrozenSpaceWarning,
        FxzipError,
        HubError,
        LowFidelityWarning,
        OptionError,
        PixelWarning,
        PreparationWarning,
        ProcessError,
        RestoreError,
        RuleError,
        SaveError,
        TraceError,
        VerificationError,
        WidthWarning,
    )
    from fxzip.export import Export
    from fxzip.information import Information, Preparation
    from fxzip.io import load
    from fxzip.matching import MergeMap
    from fxzip.merged import ZippedModel
    from fxzip.moments import Moments
    from fxzip.origins import Origin
    from fxzip.parts import put_part, zip_part
    from fxzip.prepared import Prepared
    from fxzip.renormalising import renormalise
    from fxzip.report import Report
    from fxzip.rules import register_rule
    from fxzip.settings import RefitOptions
    from fxzip.shrinking import shrink
    from fxzip.sweep import Sweep

# Where the public names live: they are imported when they are first used, so that `import fxzip` costs next to nothing.
_HOMES = {
    "analyse": "fxzip.api",
    "prepare": "fxzip.api",
    "zip": "fxzip.api",
    "ChannelSpace": "fxzip.channels",
    "ChannelSpec": "fxzip.channels",
    "AlignmentError": "fxzip.errors",
    "CalibrationError": "fxzip.errors",
    "CheckpointError": "fxzip.errors",
    "CutError": "fxzip.errors",
    "DroppedInputWarning": "fxzip.errors",
    "ExportError": "fxzip.errors",
    "FewImagesWarning": "fxzip.errors",
    "FileFormatError": "fxzip.errors",
    "FrozenSpaceWarning": "fxzip.errors",
    "FxzipError": "fxzip.errors",
    "HubError": "fxzip.errors",
    "LowFidelityWarning": "fxzip.errors",
    "OptionError": "fxzip.errors",
    "PixelWarning": "fxzip.errors",
    "PreparationWarning": "fxzip.errors",
    "ProcessError": "fxzip.errors",
    "RestoreError": "fxzip.errors",
    "RuleError": "fxzip.errors",
    "SaveError": "fxzip.errors",
    "TraceError": "fxzip.errors",
    "VerificationError": "fxzip.errors",
    "WidthWarning": "fxzip.errors",
    "Export": "fxzip.export",
    "load": "fxzip.io",
    "MergeMap": "fxzip.matching",
    "ZippedModel": "fxzip.merged",
    "Moments": "fxzip.moments",
    "Information": "fxzip.information",
    "Preparation": "fxzip.information",
    "Prepared": "fxzip.prepared",
    "Origin": "fxzip.origins",
    "put_part": "fxzip.parts",
    "renormalise": "fxzip.renormalising",
    "zip_part": "fxzip.parts",
    "Report": "fxzip.report",
    "register_rule": "fxzip.rules",
    "RefitOptions": "fxzip.settings",
    "shrink": "fxzip.shrinking",
    "Sweep": "fxzip.sweep",
}
_MODULES = ("channels", "errors", "matching", "rules", "testing", "zoo")

__all__ = [
    "AlignmentError",
    "CalibrationError",
    "ChannelSpace",
    "ChannelSpec",
    "CheckpointError",
    "CutError",
    "DroppedInputWarning",
    "Export",
    "ExportError",
    "FewImagesWarning",
    "FileFormatError",
    "FrozenSpaceWarning",
    "FxzipError",
    "HubError",
    "Information",
    "LowFidelityWarning",
    "MergeMap",
    "Moments",
    "OptionError",
    "Origin",
    "PixelWarning",
    "Preparation",
    "PreparationWarning",
    "Prepared",
    "ProcessError",
    "RefitOptions",
    "Report",
    "RestoreError",
    "RuleError",
    "SaveError",
    "Sweep",
    "TraceError",
    "VerificationError",
    "WidthWarning",
    "ZippedModel",
    "analyse",
    "load",
    "prepare",
    "put_part",
    "register_rule",
    "renormalise",
    "shrink",
    "zip",
    "zip_part",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fxzip")
    except PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"fxzip.{name}")
    raise AttributeError(f"module 'fxzip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
