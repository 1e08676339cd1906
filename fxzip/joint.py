"""`Joint`: one answer from all heads: of the same classes (federated shares, ensembles), or all classes in one list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fxzip.errors import OptionError
from fxzip.settings import EACH

Heads: TypeAlias = str | Mapping[str, float]
"""``each``, ``mean``, ``product``, ``concat``, or how much each task weighs in the mean."""
MEAN, PRODUCT, CONCAT = "mean", "product", "concat"
NAME = "joint"
"""What the head is called that answers for all."""


@dataclass(frozen=True)
class Joint:
    """How the answers of all become one.

    Attributes:
        how: ``mean`` of the outputs, or ``product`` of the class probabilities, of which it gives the logarithm but for
            a constant: the mean of the log-probabilities; or ``concat``: all classes, one task's after the other's.
        shares: How much each model counts, 1 in all.
    """

    how: str
    shares: tuple[float, ...]

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """One output from all, of the same shape, or with the classes of all."""
        if self.how == CONCAT:
            return torch.cat(list(outputs), class_axis(outputs[0].dim()))
        if self.how == PRODUCT:
            outputs = [F.log_softmax(output, class_axis(output.dim())) for output in outputs]
        first, *others = (output * share for output, share in zip(outputs, self.shares, strict=True))
        return sum(others, first)


def class_axis(dims: int) -> int:
    """The axis of the classes of an output that has some: the last, or that in front of a map's."""
    return 1 if dims > 3 else -1


def check_heads(heads: object) -> None:
    """Raise what is wrong with ``heads`` for any models.

    Raises:
        OptionError: It is none of the known words, or weights that are not positive numbers.
    """
    if isinstance(heads, Mapping):
        for task, weight in heads.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < float(weight) < math.inf:
                raise OptionError(f"heads: the weight of {task!r} is {weight!r}; it must be a number above 0")
    elif heads not in (EACH, MEAN, PRODUCT, CONCAT):
        raise OptionError(
            f"heads={heads!r}: give 'each' (a head for each task), 'mean' or 'product' (one answer from all), 'concat' "
            "(all classes in one list), or the weight of each task in the mean, by name"
        )


def joint_of(heads: Heads, names: Sequence[str]) -> Joint | None:
    """What ``heads`` means for these tasks; None: a head for each.

    Raises:
        OptionError: Weights are not for these tasks.
    """
    if isinstance(heads, Mapping):
        if set(heads) != set(names):
            raise OptionError(f"heads has weights of {', '.join(map(str, heads))}; the tasks are {', '.join(names)}")
        total = sum(heads.values())
        return Joint(MEAN, tuple(heads[name] / total for name in names))
    return None if heads == EACH else Joint(heads, (1 / len(names),) * len(names))
