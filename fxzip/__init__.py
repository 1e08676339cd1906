"""Merge trained networks of one architecture into one with a shared trunk and a head per task, without training.

zipped = fxzip.zip(model_a, model_b, loader)
logits_a, logits_b = zipped(images)
"""

from importlib.metadata import PackageNotFoundError, version

from fxzip.api import analyse, prepare, zip
from fxzip.channels import ChannelSpace, ChannelSpec
from fxzip.errors import (
    AlignmentError,
    CalibrationError,
    CutError,
    ExportError,
    FileFormatError,
    FrozenSpaceWarning,
    FxzipError,
    OptionError,
    SaveError,
    TraceError,
)
from fxzip.export import Export
from fxzip.io import load
from fxzip.matching import MergeMap
from fxzip.merged import ZippedModel
from fxzip.moments import Moments
from fxzip.prepared import Prepared
from fxzip.report import Report
from fxzip.rules import register_rule

try:
    __version__ = version("fxzip")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "AlignmentError",
    "CalibrationError",
    "ChannelSpace",
    "ChannelSpec",
    "CutError",
    "Export",
    "ExportError",
    "FileFormatError",
    "FrozenSpaceWarning",
    "FxzipError",
    "MergeMap",
    "Moments",
    "OptionError",
    "Prepared",
    "Report",
    "SaveError",
    "TraceError",
    "ZippedModel",
    "analyse",
    "load",
    "prepare",
    "register_rule",
    "zip",
]
