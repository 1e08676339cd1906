"""The register of steps: what a network may do next, and how often it does."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.builder import Builder

Step = Callable[[Builder], None]
STEPS: dict[Step, int] = {}
"""How often each step is taken, against the others."""


def step(weight: int) -> Callable[[Step], Step]:
    """Register a step: a function that adds lines to a builder, or raises `Failed` where it does not fit."""

    def register(function: Step) -> Step:
        STEPS[function] = weight
        return function

    return register
