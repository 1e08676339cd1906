"""How a rule says which numbers of a call are sizes; `fxzip.rules.sizes` has PyTorch's operations.

A size rule is a function ``rule(call)`` of a `SizedCall`, under the names that the rules of `fxzip.rules` go by. It
says what a number is: the size of an axis of the result (``call.size``), or a place on an axis of an input
(``call.part``); what these become follows from the labels of the channels that lie there
(`fxzip.passes.resize`). Operations without one have no such numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxzip.rules.keys import key_of


class SizeError(Exception):
    """Raised where a number cannot follow: it says why, and at which node of the graph where that is known."""

    def __init__(self, message: str, node: str = "") -> None:
        super().__init__(f"{node}: {message}" if node else message)
        self.node = node


class SizedCall(ABC):
    """A node whose arguments are to be changed.

    Attributes:
        node: The node.
        module: What it calls, at a call_module node; its parameters have their new sizes.
        args: Its arguments, to be changed in place.
        kwargs: Its keyword arguments, to be changed in place.
    """

    def __init__(self, node: fx.Node, module: nn.Module | None) -> None:
        self.node, self.module = node, module
        self.args: list[Any] = list(node.args)
        self.kwargs: dict[str, Any] = dict(node.kwargs)

    @abstractmethod
    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value as it was, batch 1."""

    @abstractmethod
    def part(self, node: fx.Node, axis: int, start: int, stop: int) -> int:
        """How many positions there are in the place of ``start`` to ``stop`` on an axis of a node's value."""

    @abstractmethod
    def scalar(self, node: fx.Node, old: int, new: int) -> fx.Node:
        """A number of the graph that is computed from the batch, times ``new / old``."""

    def size(self, node: fx.Node, axis: int) -> int:
        """The new size of an axis of a node's value, batch 1."""
        return self.part(node, axis, 0, self.shape(node)[axis])

    @abstractmethod
    def changes(self, node: fx.Node, axis: int) -> bool:
        """Whether spaces lie along an axis of a node's value, or some of them, that get other numbers of channels."""

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place among all, or by its name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def give(self, place: int, name: str, value: Any) -> None:
        """Set an argument."""
        if place < len(self.args):
            self.args[place] = value
        else:
            self.kwargs[name] = value

    @property
    def source(self) -> fx.Node:
        """The first input."""
        found: fx.Node = self.argument(0, "input")
        return found


SizeRule = Callable[[SizedCall], None]
_RULES: dict[object, SizeRule] = {}


def size_rule(*targets: object) -> Callable[[SizeRule], SizeRule]:
    """Register a size rule for module classes, or for names that functions, methods and ATen operators share."""

    def register(rule: SizeRule) -> SizeRule:
        for target in targets:
            _RULES[target if isinstance(target, type) else key_of(target)] = rule
        return rule

    return register


def find_size_rule(target: object) -> SizeRule | None:
    """The size rule of a node's target; None where its arguments say nothing of sizes."""
    if isinstance(target, nn.Module):
        return next((_RULES[c] for c in type(target).__mro__ if c in _RULES), None)
    return _RULES.get(key_of(target))
