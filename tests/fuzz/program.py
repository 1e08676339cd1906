"""Networks as text: a few lines that a reader understands, a test can hold, and `build` makes a module of.

    x: (3, 6, 6)
    m.a = nn.Conv2d(3, 8, 3, padding=1)
    m.h = nn.Linear(8, 2)
    v = m.a(x)
    v[:, :4].mul_(2)
    return m.h(v.mean((2, 3)))

First the inputs and their shapes, without the batch; tuples in dicts and lists where a model takes its inputs so. Then
what the module holds, in lines that begin with ``m.``; then what its forward does.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

SCOPE: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "parametrizations": parametrizations}
"""What the lines of a program can use besides ``m`` and their inputs."""
VARIABLE = r"\b(?:v[0-9]+|[xyz])\b(?!=)"
"""A pattern for the names of variables."""


@dataclass(frozen=True)
class Program:
    """A network as lines of text.

    Attributes:
        inputs: The name of each input, and its shape, or shapes in dicts and lists.
        parts: Lines that give the module its layers, parameters, buffers and hooks.
        steps: Lines of the forward.
        result: What it returns, an expression.
    """

    inputs: tuple[tuple[str, Any], ...]
    parts: tuple[str, ...]
    steps: tuple[str, ...]
    result: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """The program of a text, as `str` gives it."""
        lines = [line for line in textwrap.dedent(text).strip().splitlines() if line.strip()]
        inputs = []
        while ": " in lines[0] and lines[0].partition(": ")[0].isidentifier():
            name, _, shape = lines.pop(0).partition(": ")
            inputs.append((name, ast.literal_eval(shape)))
        first = next(i for i, line in enumerate(lines) if not line.startswith("m."))
        *steps, last = lines[first:]
        if not last.startswith("return "):
            raise ValueError(f"a program ends with what it returns, not with {last!r}")
        return cls(tuple(inputs), tuple(lines[:first]), tuple(steps), last.removeprefix("return "))

    def __str__(self) -> str:
        inputs = [f"{name}: {shape}" for name, shape in self.inputs]
        return "\n".join([*inputs, *self.parts, *self.steps, f"return {self.result}"])

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs' names."""
        return tuple(name for name, _ in self.inputs)


def build(program: Program, seed: int = 0) -> nn.Module:
    """The module of a program, with random weights of a seed, in float64 and eval mode.

    Statistics and vectors (gammas, biases) are random too: where they are 0 or 1, or all equal, errors hide.
    """
    scope = dict(SCOPE)
    arguments = ", ".join(("m", *program.names))
    body = [*program.steps, f"return {program.result}"]
    source = f"def forward({arguments}):\n" + textwrap.indent("\n".join(body), "    ")
    exec(compile(source, "<program>", "exec"), scope)
    made: nn.Module = type("Net", (nn.Module,), {"forward": scope["forward"]})()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for line in program.parts:
            exec(line, {**SCOPE, "m": made})
            made.double()
        _randomise(made)
    return made.eval()


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "original" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def inputs_of(program: Program, count: int, seed: int = 0) -> tuple[Any, ...]:
    """Random inputs (count, *shape), float64, nested as the program takes them."""
    g = Generator().manual_seed(seed)
    return tuple(_filled(shape, count, g) for _, shape in program.inputs)


def _filled(shape: Any, count: int, g: Generator) -> Any:
    if isinstance(shape, dict):
        return {key: _filled(part, count, g) for key, part in shape.items()}
    if isinstance(shape, list):
        return [_filled(part, count, g) for part in shape]
    return torch.rand(count, *shape, generator=g, dtype=torch.float64) * 2 - 1


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a model gives for copies of the inputs, without gradients."""
    with torch.no_grad():
        return model(*pytree.tree_map_only(Tensor, torch.clone, inputs))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value."""
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def off(wanted: Any, found: Any) -> float:
    """The largest difference of two outputs as a share of the largest value wanted; infinite where shapes differ."""
    left, right = list(tensors(wanted)), list(tensors(found))
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    pairs = zip(left, right, strict=True)
    worst = max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in pairs), default=0.0)
    return worst if worst == worst else float("inf")


def targets(line: str) -> list[str]:
    """The variables that a line makes; none where it writes into one."""
    left = line.partition(" = ")[0]
    return left.split(", ") if re.fullmatch(rf"(?:{VARIABLE}|, )+", left) else []


def tidy(program: Program) -> Program:
    """The program without variables, parts and inputs that nothing uses."""
    steps = list(program.steps)
    while True:
        text = [*steps, program.result]
        dead = [
            i
            for i, line in enumerate(steps)
            if (made := targets(line))
            and not any(re.search(rf"\b{name}\b", later) for name in made for later in text[i + 1 :])
        ]
        dead = [i for i in dead if not re.search(r"_\(|inplace=True|out=", steps[i])]
        if not dead:
            break
        del steps[dead[-1]]
    body = "\n".join([*steps, program.result])
    parts = list(program.parts)
    for part in reversed(program.parts):
        name = _part(part)
        others = "\n".join([*(p for p in parts if p is not part), body])
        if name and not re.search(rf"\bm\.{name}\b", others):
            parts.remove(part)
    inputs = tuple((name, shape) for name, shape in program.inputs if re.search(rf"\b{name}\b", body))
    return Program(inputs or program.inputs[:1], tuple(parts), tuple(steps), program.result)


def _part(line: str) -> str | None:
    found = re.match(r"m\.(\w+) = |m\.register_buffer\(\"(\w+)\"", line)
    return found and (found[1] or found[2])
