"""Names of architectures, without importing their libraries, which takes seconds."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Collection
from pathlib import Path

LIBRARIES = ("timm", "torchvision")
_REGISTERED = re.compile(r"^@register_model(?:\(([^)]*)\))?.*?^def (\w+)\(", re.DOTALL | re.MULTILINE)
_NAMED = re.compile(r"""name\s*=\s*["'](\w+)["']""")


def written_models(library: str) -> frozenset[str]:
    """The names that a library's files register; empty where they are not found or look otherwise."""
    spec = importlib.util.find_spec(library)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = set()
    for path in (path for folder in folders for path in Path(folder, "models").rglob("*.py")):
        for arguments, name in _REGISTERED.findall(path.read_text(encoding="utf-8")):
            named = _NAMED.search(arguments)
            found.add(named.group(1) if named else name)
    return frozenset(found)


def unknown_model(name: str, models: Callable[[str], Collection[str]]) -> str | None:
    """What is wrong with ``timm:NAME`` or ``torchvision:NAME``, in words, with near names; None: nothing.

    Args:
        name: The name.
        models: Gives the names of a library's models.
    """
    source, _, rest = name.rpartition(":")
    if source in LIBRARIES:
        known = models(source)
        # A tag of pretrained weights ("resnet50.a1_in1k") chooses the data config.
        if rest in known or (source == "timm" and rest.partition(".")[0] in known):
            return None
        near = [f"{source}:{found}" for found in difflib.get_close_matches(rest, sorted(known), n=4)]
    else:
        near = [f"{library}:{rest}" for library in LIBRARIES if rest in models(library)]
    hint = f"did you mean {', '.join(near)}?" if near else "give timm:NAME, torchvision:NAME, local-dir: or hf-hub:"
    return f"there is no model {name!r}; {hint}"
