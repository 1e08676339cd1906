"""Tensors that a model only moves about before it uses them, found again from what they become.

A table of position biases that is looked up, a bias that is put together from parts: where every element of the result
is one element of a parameter, or a constant, running the very operations on the elements' numbers says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Run = Callable[[Mapping[str, Tensor]], Tensor]


def moved_back(run: Run, shapes: Mapping[str, torch.Size], value: Tensor) -> tuple[dict[str, Tensor], bool] | None:
    """The tensors from which operations make a value.

    Args:
        run: The operations, on tensors by name.
        shapes: Of these tensors.
        value: What they should give.

    Returns:
        The tensors, and whether they give the value exactly; None where the operations do more than move elements.
        Elements that nothing is made of are 0.
    """
    total = sum(shape.numel() for shape in shapes.values())
    first = _numbered(shapes, 1)
    try:
        here, mirrored, shifted = (
            run(given).double() for given in (first, {k: -v for k, v in first.items()}, _numbered(shapes, 1 + total))
        )
    except Exception:  # the operations are the user's own, and may refuse numbers of this kind
        return None
    movable = (mirrored == -here) & (shifted == here + total) & (here >= 1)
    constant = (mirrored == here) & (shifted == here)
    if here.shape != value.shape or not bool((movable | constant).all()):
        return None
    places = (here[movable] - 1).long()
    flat = value.new_zeros(total)
    flat[places] = value[movable]
    exact = bool((flat[places] == value[movable]).all()) and bool((here[constant] == value[constant].double()).all())
    sizes = [shape.numel() for shape in shapes.values()]
    parts = zip(shapes.items(), flat.split(sizes), strict=True)
    return {name: part.reshape(shape).clone() for (name, shape), part in parts}, exact


def _numbered(shapes: Mapping[str, torch.Size], start: int) -> dict[str, Tensor]:
    """Tensors whose elements are their numbers, counted through all of them."""
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.arange(start, start + shape.numel(), dtype=torch.float64).reshape(shape)
        start += shape.numel()
    return found
