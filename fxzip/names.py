"""What a task may be called: decided here for merging and for loading alike."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_WORD = re.compile(r"[A-Za-z0-9_-]{1,100}")
_TAKEN = frozenset(dir(nn.ModuleDict()))


def bad_name(names: Iterable[object]) -> str | None:
    """What is wrong with the first name that no task can have; None: nothing.

    A name becomes a part of the names of tensors and modules, of the Python source that torch.fx and torch.export
    write, of ONNX outputs and of file names. So it is a word of ASCII letters, digits, ``_`` and ``-``, and none that
    `torch.nn.ModuleDict` uses itself.
    """
    for name in names:
        if not isinstance(name, str) or not _WORD.fullmatch(name):
            return f"{repr(name)[:60]} cannot be the name of a task: use letters from a to z, digits, _ and - only"
        if name in _TAKEN:
            return f"{name!r} cannot be the name of a task: PyTorch uses it itself; choose another word"
    return None
