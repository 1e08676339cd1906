"""Shrink: fewer lines of a program, as long as the same thing is wrong with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.generate import is_sound
from tests.fuzz.program import Program

_VARIABLE = r"\b(?:v[0-9]+|[xyz])\b(?!=)"


def shrink(program: Program, fails: Callable[[Program], bool], seconds: float = 60) -> Program:
    """The smallest program that is found in the time, of which ``fails`` holds as it does of the given one."""
    end = time.monotonic() + seconds
    known = {str(program)}
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(program):
            if time.monotonic() > end:
                return program
            if str(smaller) in known:
                continue
            known.add(str(smaller))
            if is_sound(smaller) and fails(smaller):
                program, changed = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with fewer lines, the shortest first."""
    for expression in _results(program):
        yield tidy(replace(program, result=expression))
    for number in range(len(program.steps)):
        yield from _without(program, number)


def _results(program: Program) -> Iterator[str]:
    """Other results: one of several outputs, or an earlier variable."""
    names = list(dict.fromkeys(re.findall(_VARIABLE, program.result)))
    if program.result not in names:
        yield from names
    for line in program.steps[:-1]:
        if " = " in line:
            for name in _targets(line):
                if name != program.result:
                    yield name


def _targets(line: str) -> list[str]:
    left = line.partition(" = ")[0]
    return left.split(", ") if re.fullmatch(rf"(?:{_VARIABLE}|, )+", left) else []


def _without(program: Program, number: int) -> Iterator[Program]:
    """The program without one step; where that makes a variable, another takes its place."""
    line = program.steps[number]
    rest = program.steps[:number], program.steps[number + 1 :]
    targets = _targets(line)
    if not targets:
        yield tidy(replace(program, steps=(*rest[0], *rest[1])))
        return
    for other in dict.fromkeys(re.findall(_VARIABLE, line.partition(" = ")[2])):
        pattern = rf"\b(?:{'|'.join(targets)})\b"
        later = tuple(re.sub(pattern, other, step) for step in rest[1])
        yield tidy(replace(program, steps=(*rest[0], *later), result=re.sub(pattern, other, program.result)))


def tidy(program: Program) -> Program:
    """The program without variables, parts and inputs that nothing uses."""
    steps = list(program.steps)
    while True:
        text = [*steps, program.result]
        dead = [
            i
            for i, line in enumerate(steps)
            if (targets := _targets(line))
            and not any(re.search(rf"\b{name}\b", later) for name in targets for later in text[i + 1 :])
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
