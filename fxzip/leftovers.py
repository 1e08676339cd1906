"""What torch keeps of graphs and of symbolic shapes, though nobody has them any more: it is given back after each call.

torch.fx puts the source of each graph that it compiles where tracebacks find it, and never takes it out again. Some
methods of symbolic shapes remember every environment that they were asked about.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx import graph_module

_SHAPES = "torch.fx.experimental.symbolic_shapes"


@contextmanager
def given_back() -> Iterator[None]:
    """Keep no source but that of graphs which are still there, as long as they are; and no symbolic shape."""
    before = set(_sources())
    try:
        yield
    finally:
        fresh = _sources().keys() - before
        alive = {name: kind for kind in _kinds(fx.GraphModule) if (name := _source_of(kind)) in fresh}
        for name in fresh - alive.keys():
            _forget(name)
        for name, kind in alive.items():
            weakref.finalize(kind, _forget, name).atexit = False
        for method in vars(getattr(sys.modules.get(_SHAPES), "ShapeEnv", object)).values():
            getattr(method, "cache_clear", lambda: None)()


def _sources() -> dict[str, str]:
    """The sources that torch.fx keeps, by the names of files that there are not."""
    found: dict[str, str] = graph_module._loader.eval_cache
    return found


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    """The classes that derive from one: every GraphModule has its own."""
    for inner in kind.__subclasses__():
        yield inner
        yield from _kinds(inner)


def _source_of(kind: type[Any]) -> str | None:
    """Where the source of a class's forward is."""
    return getattr(getattr(vars(kind).get("forward"), "__code__", None), "co_filename", None)


def _forget(name: str) -> None:
    """Forget a source."""
    _sources().pop(name, None)
    linecache.cache.pop(name, None)
