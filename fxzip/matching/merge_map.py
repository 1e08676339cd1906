"""`MergeMap`: the value that every matcher gives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxzip.errors import OptionError
from fxzip.matching.similarity import Ints, as_similarity, check_n_models


@dataclass(frozen=True, eq=False)
class MergeMap:
    """The map of one channel space between N models' channels and the merged ones: f* = M [f_1; ...; f_N].

    Attributes:
        merge: M, float64 of shape (n, Σn); rows sum to one. By the paper Uᵀ with each row divided by its group's
            size; one 1 in each row where channels are kept, not averaged.
        unmerge: U, float64 of shape (Σn, n). By the paper 0/1 membership, one 1 in each row; any weights where
            channels are found again by regression.
        n_models: N; Σn = N · n.
    """

    merge: Tensor
    unmerge: Tensor
    n_models: int

    @classmethod
    def from_assignment(cls, assignment: Tensor | Ints | Iterable[int], n_models: int) -> MergeMap:
        """The map that sends channel c to merged channel ``assignment[c]``.

        Args:
            assignment: Integers of shape (Σn,), each of 0 ... n - 1 at least once.
            n_models: N.

        Raises:
            OptionError: The assignment is empty, does not divide by N, or leaves a merged channel empty.
        """
        check_n_models(n_models)
        given = assignment if isinstance(assignment, Tensor | np.ndarray) else list(assignment)
        channels = torch.as_tensor(given).detach().cpu()
        size = channels.numel()
        if channels.dim() != 1 or size == 0 or size % n_models or channels.is_floating_point():
            raise OptionError(
                f"an assignment of {n_models} models is a vector of integers whose length divides by "
                f"{n_models}; got shape {tuple(channels.shape)}, {channels.dtype}"
            )
        channels, n = channels.long(), size // n_models
        if not torch.equal(torch.unique(channels), torch.arange(n)):
            raise OptionError(f"each of 0 ... {n - 1} must come up in an assignment of {size} channels")
        merge = torch.zeros(n, size, dtype=torch.float64)
        unmerge = torch.zeros(size, n, dtype=torch.float64)
        merge[channels, torch.arange(size)] = 1.0 / channels.bincount()[channels].double()
        unmerge[torch.arange(size), channels] = 1.0
        return cls(merge, unmerge, n_models)

    @classmethod
    def from_selection(cls, kept: Tensor, unmerge: Tensor, n_models: int) -> MergeMap:
        """The map that keeps some channels and finds all others from them.

        Args:
            kept: The channels that are kept, int64 of shape (n,), all different.
            unmerge: U, (Σn, n), with the rows of the kept ones those of the identity.
            n_models: N.
        """
        merge = torch.zeros(len(kept), len(unmerge), dtype=torch.float64)
        merge[torch.arange(len(kept)), kept] = 1.0
        return cls(merge, unmerge.double(), n_models)

    @cached_property
    def sparse(self) -> tuple[Tensor, Tensor] | None:
        """The merged channel of each channel and its weight there, both (Σn,); None if a channel goes to several."""
        if bool(((self.unmerge != 0).sum(1) != 1).any()) or bool(((self.merge != 0).sum(0) > 1).any()):
            return None
        target = self.unmerge.argmax(1)
        return target, self.merge[target, torch.arange(len(target))]

    @cached_property
    def positive(self) -> MergeMap:
        """The map with each row of M as shares, |M| over its sum, for what may not be negative (variances)."""
        if bool((self.merge >= 0).all()):
            return self
        shares = self.merge.abs()
        return MergeMap(shares / shares.sum(1, keepdim=True), self.unmerge, self.n_models)

    @property
    def assignment(self) -> Tensor:
        """The merged channel of each channel, the one that it is found from most; int64 of shape (Σn,)."""
        return self.unmerge.abs().argmax(1)

    @property
    def within_share(self) -> float:
        """The share of matched pairs that lie within one model.

        A matched pair is an unordered pair of different channels that go to the same merged channel, so a
        group of size g counts g(g - 1)/2 pairs. Zero where there are none (one model).
        """
        group = torch.nn.functional.one_hot(self.assignment, self.unmerge.shape[1]).double()
        members = group.reshape(self.n_models, -1, self.unmerge.shape[1]).sum(1)  # (N, n)
        pairs = float(_pairs(members.sum(0)).sum())
        return float(_pairs(members).sum()) / pairs if pairs else 0.0

    def mean_correlation(self, similarity: Tensor | npt.ArrayLike) -> float:
        """The mean of ``similarity`` (Σn, Σn) over the matched pairs of `within_share`; NaN without any.

        Raises:
            OptionError: The similarity does not fit this map or is not finite.
        """
        values = as_similarity(similarity, self.n_models)
        if values.shape[0] != self.unmerge.shape[0]:
            raise OptionError(f"similarity {values.shape} does not fit a map of {len(self.unmerge)} channels")
        group = self.assignment.numpy()
        matched = np.triu(group[:, None] == group[None, :], k=1)
        return float(values[matched].mean()) if matched.any() else math.nan


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2
