"""Random networks, and what makes one fit to be checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from random import Random
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.fuzz import layers, mixes, moves, writes
from tests.fuzz.builder import CHANNELS, Builder, Failed
from tests.fuzz.program import Program, build, inputs_of, off, run, tensors, tidy
from tests.fuzz.vocabulary import STEPS, Step

_ = layers, mixes, moves, writes  # imported to register their steps


def network(random: Random, most: int = 8, without: Collection[str] = ()) -> Program:
    """A random network that can be checked.

    Args:
        random: Where all choices come from.
        most: Most steps, beside the first and last layers.
        without: Steps, or modules of steps (``writes``), that are left out: to see what else is wrong.
    """
    steps = {s: w for s, w in STEPS.items() if not {s.__name__, s.__module__.rpartition(".")[2]} & set(without)}
    while True:
        program = _attempt(Builder(random), most, steps)
        if program is not None and random.random() < 0.9:
            program = tidy(program)
        if program is not None and is_sound(program):
            return program


def _attempt(b: Builder, most: int, steps: Mapping[Step, int]) -> Program | None:
    try:
        _begin(b)
        wanted, tried = b.number(2, most), 0
        while wanted and tried < 40:
            mark = b.mark()
            tried += 1
            try:
                b.random.choices(list(steps), list(steps.values()))[0](b)
                wanted -= 1
            except Failed:
                b.back(mark)
        return b.program(_end(b))
    except Failed:
        return None


def _begin(b: Builder) -> None:
    """Inputs, and a first layer of each."""
    shapes = [_shape(b)]
    while len(shapes) < 3 and b.chance(0.15):
        shapes.append(shapes[0] if b.chance(0.5) else _shape(b))
    names = "xyz"[: len(shapes)]
    if b.chance(0.08):
        _nested(b, names, shapes)
    else:
        for name, shape in zip(names, shapes, strict=True):
            b.input(name, shape)
    if b.chance(0.04):
        b.line("m.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25, *args[1:]))")
    for name in names:
        if b.chance(0.9):
            layers.maybe_activation(b, layers.layer(b, name, b.number(4, CHANNELS)), 0.7)


def _nested(b: Builder, names: str, shapes: list[tuple[int, ...]]) -> None:
    if len(names) == 1:
        b.input("given", {"batch": {"image": shapes[0]}})
        b.add_named("x", 'given["batch"]["image"]')
        return
    b.input("given", {"image": shapes[0], "more": list(shapes[1:])})
    b.add_named("x", 'given["image"]')
    for i, name in enumerate(names[1:]):
        b.add_named(name, f'given["more"][{i}]')


def _shape(b: Builder) -> tuple[int, ...]:
    kind = b.number(0, 9)
    if kind < 6:
        size = b.choose(3, 4, 4, 6, 6, 8)
        return (b.number(1, 4), size, size if b.chance(0.7) else b.choose(3, 4, 5, 6))
    if kind < 8:
        return (b.number(2, 6), b.number(3, 8))
    return (b.number(3, 8),)


def _end(b: Builder) -> str:
    """What is returned: the last variable and those that nobody read, each through a head or as a part of one."""
    left = b.unread()
    if not left:
        left = [b.variable()]
    heads = [_head(b, name) for name in left[-3:]]
    shape = ", ".join(["-1", *["1"] * (b.values[heads[0]].dim() - 1)])
    for name in left[:-3]:
        heads[0] = b.add(f"{heads[0]} + {name}.flatten(1).mean(1).reshape({shape})")
    if len(heads) == 1:
        return heads[0] if b.chance(0.9) else f'{{"out": {heads[0]}}}'
    if b.chance(0.5) and len({b.values[h].dim() for h in heads}) == 1 and b.values[heads[0]].dim() == 2:
        return layers.linear(b, b.add(f"torch.cat([{', '.join(heads)}], 1)"), 3)
    return b.choose(f"({', '.join(heads)})", f"[{', '.join(heads)}]")


def _head(b: Builder, v: str) -> str:
    rank = b.values[v].dim()
    classes = b.number(2, 4)
    kind = b.number(0, 9)
    if rank == 4 and kind < 2:
        return b.add(f"{b.part(f'nn.Conv2d({b.shape(v)[1]}, {classes}, 1)')}({v})")
    if kind < 4 and b.values[v][0].numel() <= 200:
        return layers.linear(b, b.add(f"{v}.flatten(1)") if rank > 2 else v, classes)
    if kind < 5 and rank == 3:
        return layers.linear(b, v, classes)
    return layers.linear(b, b.add(_pooled(b, v)) if rank > 2 else v, classes)


def _pooled(b: Builder, v: str) -> str:
    rank = b.values[v].dim()
    if rank == 2:
        return v
    if rank == 3:
        return f"{v}.mean({b.choose(1, 2)})"
    return f"{v}.mean({tuple(range(2, rank))})" if b.chance(0.7) else f"{v}.amax({tuple(range(2, rank))})"


def is_sound(program: Program) -> bool:
    """Whether a program runs, and its outputs can be compared with others of the same network.

    It must leave its inputs and parameters as they are, its outputs must be finite and differ between examples, and
    what rounding changes must not be blown up.
    """
    try:
        inputs = inputs_of(program, 16, seed=5)
        model = build(program)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        wanted = run(model, inputs)
        with torch.no_grad():
            again = model(*inputs)
        nearby = run(model, pytree.tree_map_only(torch.Tensor, _nudged, inputs))
    except Exception:
        return False
    same = off(inputs_of(program, 16, seed=5), inputs) == 0 and off(state, dict(model.state_dict())) == 0
    return same and all(map(_alive, tensors(wanted))) and off(wanted, again) == 0 and off(wanted, nearby) < 1e-6


def _nudged(value: torch.Tensor) -> torch.Tensor:
    return value + 1e-10 * torch.sign(value - 0.1)


def _alive(value: Any) -> bool:
    """Finite, not huge, and not the same for all examples."""
    value = value.double()
    return bool(value.isfinite().all()) and float(value.std(0).mean()) > 1e-4 * max(1.0, float(value.abs().max()))
