"""What can be drawn here: by the ending of a file's name, and by what is installed."""

from __future__ import annotations

import importlib.util
import shutil

PICTURES = (".svg", ".png", ".pdf")
TEXTS = (".mmd", ".mermaid", ".dot", ".gv")


def lacking(suffix: str) -> str | None:
    """What a drawing of this kind needs and is not installed, with what to do; None if all is there."""
    return None if suffix in (".mmd", ".mermaid", ".svg") else graphviz_lacks(suffix in PICTURES)


def graphviz_lacks(picture: bool = True) -> str | None:
    """What Graphviz needs, for a picture or for its text, and is not installed; None if all is there."""
    if importlib.util.find_spec("pydot") is None:
        return "pydot is not installed: pip install 'fxzip[report]'"
    if picture and shutil.which("dot") is None:
        return "dot is not installed; it comes with Graphviz (apt install graphviz, brew install graphviz)"
    return None
