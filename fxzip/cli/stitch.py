"""``fxzip zip --stitch``: networks that share nothing, of which one goes on from the other's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxzip.cli.merge import Merge

_READ = ("names", "labels", "method", "cut", "start", "width", "hold_back")
_GIVEN = ("budget", "heads", "verify", "resume", "memory", "stats_device")


def stitch_models(models: Sequence[Any], loader: Any, run: Merge, given: Mapping[str, Any]) -> Any:
    """What `fxzip.zip` gives with ``stitch=True``.

    Args:
        models: The networks.
        loader: Their images.
        run: The run of the command, with the options that it has read.
        given: All its options.
    """
    import fxzip

    options = {key: getattr(run, key) for key in _READ} | {key: given[key] for key in _GIVEN} | run.options
    refit = run.refit if given["refit"] else False
    return fxzip.zip(*models, loader=loader, stitch=True, refit=refit, progress=not run.quiet, **options)
