"""The values that a parent's tensors get, and those that no tensor of it can hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxzip.errors import RestoreError

Key = tuple[str, ...]
"""Where a value comes from: the part of the merged network, and the tensor's name there or what it was made of."""


@dataclass(frozen=True, eq=False)
class Value:
    """What a parent's tensor holds in the merged network.

    Attributes:
        key: Where it comes from; values of one key are one tensor, whichever parent they are for.
        tensor: The value.
    """

    key: Key
    tensor: Tensor


@dataclass(eq=False)
class Values:
    """The values of one parent's tensors, by their names in the parent's graph.

    Attributes:
        found: The values.
        doubts: Tensors whose value may not be exact, and why.
    """

    found: dict[str, Value] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, key: Key, tensor: Tensor) -> None:
        """Give a tensor a value.

        Raises:
            RestoreError: It has another one already.
        """
        old = self.found.get(name)
        if old is not None and old.key != key and not torch.equal(old.tensor, tensor):
            raise RestoreError(
                f"{name} is used at several places, and the merged network has a tensor of its own for each of them "
                f"({'.'.join(old.key)}, {'.'.join(key)}): the model's class has only one"
            )
        if old is None:
            self.found[name] = Value(key, tensor)

    def refuse_unless(self, neutral: float, tensor: Tensor, what: str) -> None:
        """Raise unless a tensor that the parent does not have changes nothing.

        Raises:
            RestoreError: It does.
        """
        if not bool((tensor == neutral).all()):
            raise RestoreError(
                f"{what}, for which the model's class has no place: merge with "
                "refit=fxzip.RefitOptions(biases=False), which adds no biases that a class cannot hold"
            )
