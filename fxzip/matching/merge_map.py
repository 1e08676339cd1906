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

from fxzip.channels import Role
from fxzip.errors import OptionError
from fxzip.matching.similarity import Ints, as_similarity, check_n_models


@dataclass(frozen=True, eq=False)
class MergeMap:
    """The map of one channel space between N models' channels and the merged ones: f* = M [f_1; ...; f_N].

    There may be as many merged channels as one model has, n, more or fewer: n_out, at most Σn.

    Where each channel goes to one merged channel only, as it mostly does, that and its weight is all that is kept:
    M and U are made when they are asked for, since a space of 3,072 channels would take 300 MB for both.

    Attributes:
        n_models: N; Σn = N · n.
        sparse: The merged channel of each channel, int64, and its weight in M, float64, both (Σn,); None where a
            channel goes to several or is found from several.
        dense: M and U where ``sparse`` is None.
        n_out: The number of merged channels, where ``sparse`` does not tell: some are made of none.
    """

    n_models: int
    sparse: tuple[Tensor, Tensor] | None
    dense: tuple[Tensor, Tensor] | None = None
    n_out: int | None = None

    @classmethod
    def from_matrices(cls, merge: Tensor, unmerge: Tensor, n_models: int) -> MergeMap:
        """The map of M (n_out, Σn) and U (Σn, n_out)."""
        if bool(((unmerge != 0).sum(1) != 1).any()) or bool(((merge != 0).sum(0) > 1).any()):
            return cls(n_models, None, (merge.double(), unmerge.double()))
        target = unmerge.argmax(1)
        if len(target.unique()) < len(merge):  # some are found from by none
            return cls(n_models, None, (merge.double(), unmerge.double()))
        if bool((unmerge[torch.arange(len(target)), target] != 1).any()):
            return cls(n_models, None, (merge.double(), unmerge.double()))
        return cls(n_models, (target, merge[target, torch.arange(len(target))].double()))

    @classmethod
    def from_assignment(cls, assignment: Tensor | Ints | Iterable[int], n_models: int) -> MergeMap:
        """The map that sends channel c to merged channel ``assignment[c]``.

        Args:
            assignment: Integers of shape (Σn,), each of 0 ... n_out - 1 at least once.
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
        channels = channels.long()
        n_out = int(channels.max()) + 1
        if not torch.equal(torch.unique(channels), torch.arange(n_out)):
            raise OptionError(
                f"an assignment of {size} channels to {n_out} merged ones must use each of 0 ... {n_out - 1}"
            )
        return cls(n_models, (channels, 1.0 / channels.bincount()[channels].double()))

    @classmethod
    def from_selection(cls, kept: Tensor, unmerge: Tensor, n_models: int) -> MergeMap:
        """The map that keeps some channels and finds all others from them.

        Args:
            kept: The channels that are kept, int64 of shape (n_out,), all different.
            unmerge: U, (Σn, n_out), with the rows of the kept ones those of the identity.
            n_models: N.
        """
        merge = torch.zeros(len(kept), len(unmerge), dtype=torch.float64)
        merge[torch.arange(len(kept)), kept] = 1.0
        return cls.from_matrices(merge, unmerge, n_models)

    @cached_property
    def size(self) -> int:
        """The number n_out of merged channels."""
        if self.n_out is not None:
            return self.n_out
        if self.sparse is not None:
            return int(self.sparse[0].max()) + 1
        assert self.dense is not None
        return self.dense[0].shape[0]

    @property
    def width(self) -> int:
        """The number n of each model's channels."""
        parts = self.sparse or self.dense
        assert parts is not None
        return (parts[0].shape[0] if self.sparse else parts[0].shape[1]) // self.n_models

    @property
    def merge(self) -> Tensor:
        """M, float64 of shape (n_out, Σn); rows sum to one.

        By the paper Uᵀ with each row divided by its group's size; one 1 in each row where channels are kept, not
        averaged; any numbers where directions are (`pca`, `cca`).
        """
        if self.dense is not None:
            return self.dense[0]
        return torch.cat([self.part(model, "produce") for model in range(self.n_models)], 1)

    @property
    def unmerge(self) -> Tensor:
        """U, float64 of shape (Σn, n_out).

        By the paper 0/1 membership, one 1 in each row; any weights where channels are found again by regression.
        """
        if self.dense is not None:
            return self.dense[1]
        return torch.cat([self.part(model, "contract").T for model in range(self.n_models)])

    def part(self, model: int, role: Role) -> Tensor:
        """M_p of one model for a producing site, U_pᵀ for a contracting one; both (n_out × n)."""
        here = slice(model * self.width, (model + 1) * self.width)
        if self.dense is not None:
            return self.dense[0][:, here] if role == "produce" else self.dense[1][here].T
        assert self.sparse is not None
        target, weight = (value[here] for value in self.sparse)
        found = torch.zeros(self.size, self.width, dtype=torch.float64)
        found[target, torch.arange(self.width)] = weight if role == "produce" else 1.0
        return found

    @cached_property
    def positive(self) -> MergeMap:
        """The map with each row of M as shares, |M| over its sum, for what may not be negative (variances)."""
        if self.dense is None or bool((self.dense[0] >= 0).all()):
            return self
        shares = self.dense[0].abs()
        total = shares.sum(1, keepdim=True)
        return MergeMap(self.n_models, None, (shares / torch.where(total > 0, total, 1.0), self.dense[1]))

    @property
    def assignment(self) -> Tensor:
        """The merged channel of each channel, the one that it is found from most; int64 of shape (Σn,)."""
        if self.sparse is not None:
            return self.sparse[0]
        assert self.dense is not None
        return self.dense[1].abs().argmax(1)

    def members(self, merged: int) -> Tensor:
        """The channels that a merged channel is made of, ascending."""
        if self.dense is not None:
            return self.dense[0][merged].nonzero().flatten()
        assert self.sparse is not None
        return ((self.sparse[0] == merged) & (self.sparse[1] > 0)).nonzero().flatten()

    @property
    def within_share(self) -> float:
        """The share of matched pairs that lie within one model.

        A matched pair is an unordered pair of different channels that go to the same merged channel, so a
        group of size g counts g(g - 1)/2 pairs. Zero where there are none (one model).
        """
        members = torch.stack([own.bincount(minlength=self.size) for own in self.assignment.chunk(self.n_models)])
        pairs = float(_pairs(members.sum(0)).sum())
        return float(_pairs(members).sum()) / pairs if pairs else 0.0

    def mean_correlation(self, similarity: Tensor | npt.ArrayLike) -> float:
        """The mean of ``similarity`` (Σn, Σn) over the matched pairs of `within_share`; NaN if there are none.

        Raises:
            OptionError: The similarity does not fit this map or is not finite.
        """
        values = as_similarity(similarity, self.n_models)
        group = self.assignment.numpy()
        if len(values) != len(group):
            raise OptionError(f"similarity {values.shape} does not fit a map of {len(group)} channels")
        order = np.argsort(group, kind="stable")
        matched = []
        for step in range(1, int(np.bincount(group).max())):  # the members of a group lie side by side in this order
            same = group[order[step:]] == group[order[:-step]]
            matched.append(values[order[:-step][same], order[step:][same]])
        pairs = np.concatenate(matched) if matched else np.empty(0)
        return float(pairs.mean()) if len(pairs) else math.nan


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2
