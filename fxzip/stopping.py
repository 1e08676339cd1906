"""Ctrl-C of the program ``fxzip``: status 130 and one line, from the first moment."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOPPED = 130
"""The exit status after Ctrl-C, as shells have it."""
SAID = "fxzip: stopped; no result was written"

_REPORTS = "fxzip.cli.errors"
_IMPORTS = ("importlib._bootstrap", "_frozen_importlib")


def end_on_interrupt() -> None:
    """Make Ctrl-C end this process where no command can report it, unless it is ignored (as in the background)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        own = os.getpid()
        signal.signal(signal.SIGINT, lambda _, frame: _stop(frame, own))


def _stop(frame: FrameType | None, own: int) -> None:
    """Raise KeyboardInterrupt where a command runs, whose group reports it; end at once everywhere else.

    Whoever is being imported may swallow an exception, or make another one of it.
    """
    if os.getpid() != own:  # a loader's worker
        raise KeyboardInterrupt
    while frame is not None and frame.f_globals.get("__name__") not in _IMPORTS:
        if frame.f_globals.get("__name__") == _REPORTS:
            raise KeyboardInterrupt
        frame = frame.f_back
    _end()


def _end() -> None:
    """Take away what is half written, say so, and end without unwinding."""
    for path in tuple(getattr(sys.modules.get("fxzip.folders"), "OPEN", ())):
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # a bar hides it
    os.write(2, f"{cursor}{SAID}\n".encode())
    os._exit(STOPPED)
