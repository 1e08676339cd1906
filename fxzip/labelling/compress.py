"""Compress: labels as small as they can be, of size 1 on every axis along which they do not vary."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxzip.labelling.labels import FIRST, FIXED, SMALL, VOID

Apart = Callable[[Tensor, Tensor], None]
"""Told which labels (n,) have constants at which places, as a number for each pattern of them (n,)."""


def compress(labels: Tensor, apart: Apart | None = None) -> Tensor | None:
    """Shrink to size 1 every axis along which labels do not vary; None if nothing is labelled at all.

    `VOID` agrees with every label, so that zero padding of pixels leaves a factor as it is. It does so where all labels
    have it at the same places: else one label's element is another's constant.

    Args:
        labels: The labels.
        apart: What is told of labels that have it at other places, so that they are not exchanged; None: they are not
            shrunk then.
    """
    if labels.numel() == 0:
        return None
    for axis, stride in enumerate(labels.stride()):
        if stride == 0:  # an expanded axis needs no look
            labels = labels.narrow(axis, 0, 1)
    found = _shrunk(labels, filled=True)
    if found.shape != labels.shape and bool((labels == VOID).any()):
        which, patterns = _voids(labels, found)
        if len(patterns) and bool((patterns != patterns[0]).any()):
            if apart is None:
                found = _shrunk(labels, filled=False)
            else:
                apart(which, patterns.unique(dim=0, return_inverse=True)[1])
    if found.numel() == 1 and int(found) <= FIXED:
        return None
    return None if bool((found == VOID).all()) else found.contiguous()


def _shrunk(labels: Tensor, filled: bool) -> Tensor:
    """Without the axes along which labels do not vary, or only between a label and `VOID` where it may be filled."""
    for axis in range(labels.dim()):
        if labels.shape[axis] == 1 or (labels.numel() > SMALL and _differ(labels, axis)):
            continue
        first = labels.narrow(axis, 0, 1)
        if bool((labels == first).all()):
            labels = first
        elif filled:
            top = labels.amax(axis, keepdim=True)
            labels = top if bool(((labels == top) | (labels == VOID)).all()) else labels
    return labels


def _voids(labels: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The labels found that may move, (n,), and where along the axes that are gone each is `VOID`, (n, m)."""
    kept = [axis for axis, size in enumerate(found.shape) if size > 1]
    gone = [axis for axis in range(found.dim()) if axis not in kept]
    rows = (labels == VOID).permute(*kept, *gone).reshape(found.numel(), -1)
    moving = found.reshape(-1) >= FIRST
    return found.reshape(-1)[moving], rows[moving]


def _differ(labels: Tensor, axis: int) -> bool:
    """Whether the first two positions along an axis tell that labels vary along it; often they do."""
    first, second = labels.select(axis, 0), labels.select(axis, 1)
    return bool(((first != second) & (first != VOID) & (second != VOID)).any())
