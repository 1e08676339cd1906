"""Tensors that a model moves about, or scales, before it uses them, found again from what they become.

A table of position biases that is looked up, a bias that is put together from parts: where every element of the result
is one element of a parameter, or a constant, running the very operations on the elements' numbers says which.

A weight that is normalised and scaled by a gain for each filter (weight normalisation, weight standardisation) is taken
as it is merged, with the gains that give it back; whether they do is seen by running the operations.
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


def scaled_back(run: Run, shapes: Mapping[str, torch.Size], value: Tensor) -> dict[str, Tensor] | None:
    """A weight and the gains of its filters from which operations make a value; None where they cannot.

    A standardised weight has a mean of 0 in each filter: it gives no others.

    Args:
        run: The operations, on tensors by name.
        shapes: Of these tensors.
        value: What they should give.
    """
    weights = [name for name, shape in shapes.items() if shape.numel() == value.numel()]
    gains = [name for name in shapes if name not in weights]
    if len(weights) != 1 or len(gains) != 1:
        return None
    (weight,), (gain,) = weights, gains
    wanted = value.double()
    for axis in (a for a, size in enumerate(value.shape) if size == shapes[gain].numel()):
        rest = [a for a in range(value.dim()) if a != axis]
        given = {weight: wanted.reshape(shapes[weight]), gain: torch.ones(shapes[gain], dtype=torch.float64)}
        try:
            plain = run(given).double()
            ratio = (plain * wanted).sum(rest) / plain.square().sum(rest).clamp(min=1e-30)
            given[gain] = ratio.reshape(shapes[gain])
            found = run(given).double()
        except Exception:  # the operations are the user's own, and may refuse other types
            return None
        if found.shape == value.shape and float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()):
            return {name: tensor.to(value.dtype) for name, tensor in given.items()}
    return None
