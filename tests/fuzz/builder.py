"""The builder: makes a program line by line, and runs each line at once to know the shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.program import SCOPE, VARIABLE, Program

CHANNELS = 12
"""Most channels that a layer gives."""
_ELEMENTS = 1200
"""Most elements of a value, for one example."""
_BATCH = 2


class Failed(Exception):
    """A step does not fit the values that there are; nothing was added."""


class Builder:
    """Holds the lines of a program so far, and the values of its variables on a small batch.

    Attributes:
        random: Where choices come from.
        values: The variables, in the order in which they were made.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.values: dict[str, Tensor] = {}
        self.module = nn.Module()
        self._inputs: list[tuple[str, Any]] = []
        self._parts: list[str] = []
        self._steps: list[str] = []
        self._read: set[str] = set()
        self._own: set[int] = set()
        self._scope: dict[str, Any] = {**SCOPE, "m": self.module}

    # ---- choices

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choose(self, *options: Any) -> Any:
        return self.random.choice(options)

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return self.random.randint(low, high)

    def divisor(self, *numbers: int) -> int:
        """A number greater than 1 that divides all of them, or 1 where there is none."""
        fitting = [d for d in range(2, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
        return self.random.choice(fitting) if fitting else 1

    def variable(self, *ranks: int, fits: Callable[[Tensor], bool] = lambda v: True) -> str:
        """A variable of one of these ranks (any without), mostly a late one; raises `Failed` if there is none."""
        found = [n for n, v in self.values.items() if (not ranks or v.dim() in ranks) and v.dim() > 1 and fits(v)]
        found = [n for n in found if self.values[n].is_floating_point()]
        if not found:
            raise Failed
        unread = [n for n in found if n not in self._read]
        if unread and self.chance(0.5):
            return unread[-1]
        back = min(int(self.random.expovariate(1.2)), len(found) - 1)
        return found[-1 - back]

    def like(self, name: str) -> str:
        """Another variable of the same shape."""
        shape = self.shape(name)
        return self.variable(fits=lambda v: v.shape == shape and v is not self.values[name])

    def shape(self, name: str) -> torch.Size:
        return self.values[name].shape

    def writable(self, name: str) -> bool:
        """Whether a variable's memory is the forward's own, not that of an input or a parameter."""
        own = {p.untyped_storage().data_ptr() for p in (*self.module.parameters(), *self.module.buffers())}
        return self.values[name].untyped_storage().data_ptr() not in own | self._own

    # ---- lines

    def input(self, name: str, shape: Any) -> None:
        """Add an input; a shape in dicts and lists is taken apart by the steps that follow."""
        self._inputs.append((name, shape))
        value = _example(shape, torch.Generator().manual_seed(len(self._inputs)))
        self._scope[name] = value
        for leaf in torch.utils._pytree.tree_leaves(value):
            self._own.add(leaf.untyped_storage().data_ptr())
        if isinstance(value, Tensor):
            self.values[name] = value

    def part(self, expression: str) -> str:
        """Give the module a layer or a parameter; how steps call it."""
        name = f"m.{_name(len(self._parts))}"
        return self.line(f"{name} = {expression}", name)

    def line(self, text: str, name: str = "") -> str:
        """Add a line to the module's parts."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(self._parts))
                exec(text, self._scope)
            self.module.double().eval()
        except Exception as error:
            raise Failed(str(error)) from error
        self._parts.append(text)
        return name

    def parameter(self, *shape: int) -> str:
        return self.part(f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")

    def add(self, expression: str) -> str:
        """Add ``v = expression`` and say what v is called; raises `Failed` where it is too large or not finite."""
        name = f"v{sum(1 for n in self._scope if re.fullmatch(r'v[0-9]+', n))}"
        before = dict(self._scope)
        try:
            with torch.no_grad():
                exec(f"{name} = {expression}", self._scope)
        except Exception as error:
            self._scope = before
            raise Failed(str(error)) from error
        value = self._scope[name]
        if isinstance(value, Tensor):
            if value.shape[:1] != (_BATCH,) or value[0].numel() > _ELEMENTS or value.dim() > 6 or not _usable(value):
                self._scope = before
                raise Failed("too large, not finite, or without a batch")
            self.values[name] = value
        self._note(f"{name} = {expression}")
        return name

    def add_named(self, name: str, expression: str) -> None:
        """Add a variable under a name of its own: an input that is taken out of what was given."""
        exec(f"{name} = {expression}", self._scope)
        self.values[name] = self._scope[name]
        self._note(f"{name} = {expression}")

    def parts_of(self, expression: str, count: int) -> list[str]:
        """Add ``v1, v2 = expression``."""
        first = sum(1 for n in self._scope if re.fullmatch(r"v[0-9]+", n))
        names = [f"v{first + i}" for i in range(count)]
        try:
            with torch.no_grad():
                exec(f"{', '.join(names)} = {expression}", self._scope)
        except Exception as error:
            raise Failed(str(error)) from error
        for name in names:
            self.values[name] = self._scope[name]
        self._note(f"{', '.join(names)} = {expression}")
        return names

    def do(self, statement: str) -> None:
        """Add a line that is run for what it writes."""
        try:
            with torch.no_grad():
                exec(statement, self._scope)
        except Exception as error:
            raise Failed(str(error)) from error
        self._steps.append(statement)
        self._read |= set(re.findall(VARIABLE, statement)[1:])  # the first is what is written to

    def _note(self, line: str) -> None:
        self._steps.append(line)
        self._read |= set(re.findall(VARIABLE, line.partition(" = ")[2]))

    # ---- a place to go back to

    def mark(self) -> Any:
        """What `back` needs."""
        copies = {n: v.clone() for n, v in self.values.items()}
        return len(self._parts), len(self._steps), dict(self.values), dict(self._scope), set(self._read), copies

    def back(self, mark: Any) -> None:
        """Forget the lines since a mark, and what they wrote."""
        parts, steps, values, scope, self._read, copies = mark
        for line in self._parts[parts:]:
            name = re.match(r"m\.(\w+) = ", line)
            if name and hasattr(self.module, name[1]):
                delattr(self.module, name[1])
        del self._parts[parts:], self._steps[steps:]
        self.values, self._scope = values, scope
        for name, value in copies.items():
            if not torch.equal(values[name], value):
                values[name].copy_(value)

    def unread(self) -> list[str]:
        """Variables that no line reads, and that share no memory with one that is read later."""
        return [name for name, value in self.values.items() if name not in self._read and value.is_floating_point()]

    def program(self, result: str) -> Program:
        return Program(tuple(self._inputs), tuple(self._parts), tuple(self._steps), result)


def _name(number: int) -> str:
    letters = "abcdefghijklnopqrstuvwxyz"  # no m, which is the module
    return letters[number % 25] + (str(number // 25) if number >= 25 else "")


def _example(shape: Any, g: torch.Generator) -> Any:
    if isinstance(shape, dict):
        return {key: _example(part, g) for key, part in shape.items()}
    if isinstance(shape, list):
        return [_example(part, g) for part in shape]
    return torch.rand(_BATCH, *shape, generator=g, dtype=torch.float64) * 2 - 1


def _usable(value: Tensor) -> bool:
    if value.numel() == 0 or not value.is_floating_point():
        return False
    return bool(value.isfinite().all()) and float(value.detach().abs().max()) < 1e4
