"""What is set around a call: it changes no result, and is after the call as it was before."""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from fxzip.leftovers import given_back

_P = ParamSpec("_P")
_T = TypeVar("_T")

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""The kinds of devices that autocast may be on for."""


def undisturbed(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a public function independent of the modes around its call, and let it leave no trace there.

    Autocast, inference mode, grad mode and a default device without values do not reach inside. The state of torch's,
    NumPy's and Python's random numbers, the warning filters and the environment are put back, also on failure; what
    torch keeps of graphs is given back.
    """

    @wraps(function)
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with given_back(), _modes(), _random_state(), _environment(), warnings.catch_warnings():
            return function(*args, **kwargs)

    return inside


@contextmanager
def _modes() -> Iterator[None]:
    """The modes that torch starts with."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, _KINDS):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type == "meta":  # nothing made there would have values
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    legacy: Any = np.random  # the generator that is NumPy's global one
    state, numbers = random.getstate(), legacy.get_state()
    try:
        # Not asked of where nothing was started yet: that would load a library of the driver's.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
        legacy.set_state(numbers)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextmanager
def unheard() -> Iterator[None]:
    """Keep what torch logs and prints on stderr out of sight: it goes to the logger ``fxzip``, for debugging."""
    text = io.StringIO()
    logger = logging.getLogger("torch")
    handlers, logger.handlers = logger.handlers, [logging.StreamHandler(text)]
    propagate, logger.propagate = logger.propagate, False
    try:
        with redirect_stderr(text):
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if text.getvalue().strip():
            logging.getLogger("fxzip").debug(text.getvalue().rstrip())
