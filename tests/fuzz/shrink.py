"""Shrink: fewer lines of a program, as long as the same thing is wrong with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.generate import is_sound
from tests.fuzz.program import VARIABLE, Program, targets, tidy


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
    names = list(dict.fromkeys(re.findall(VARIABLE, program.result)))
    if program.result not in names:
        yield from names
    for line in program.steps[:-1]:
        if " = " in line:
            for name in targets(line):
                if name != program.result:
                    yield name


def _without(program: Program, number: int) -> Iterator[Program]:
    """The program without one step; where that makes a variable, another takes its place."""
    line = program.steps[number]
    rest = program.steps[:number], program.steps[number + 1 :]
    made = targets(line)
    if not made:
        yield tidy(replace(program, steps=(*rest[0], *rest[1])))
        return
    for other in dict.fromkeys(re.findall(VARIABLE, line.partition(" = ")[2])):
        pattern = rf"\b(?:{'|'.join(made)})\b"
        later = tuple(re.sub(pattern, other, step) for step in rest[1])
        yield tidy(replace(program, steps=(*rest[0], *later), result=re.sub(pattern, other, program.result)))
