"""Verify: every merge is checked before it is fitted (translation validation).

What a compiler gives is right by its rules, and rules have faults. So each result is validated by itself (Pnueli,
Siegel and Singerman, "Translation validation", TACAS 1998), by facts that hold exactly whatever the weights are:

1. *Permutation*: a network with the channels of all spaces in a random order computes the same function.
2. *Self-merge*: the network merged with such a copy of itself by the true maps, between the very places that are asked
   for, is itself again, at both heads.
3. *Ensemble*: with an empty trunk, the heads are the models.

The first network is checked on two samples, in float64 where memory holds it so; its parameters and statistics are
changed by some per cent first, so that biases of zero or scales that are not trained yet hide nothing. What fails is
narrowed down to the spaces that are to blame by bisection.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor, fx

from fxzip.channels import ChannelSpec
from fxzip.data.batches import Inputs, with_batch_size
from fxzip.errors import FrozenSpaceWarning, VerificationError
from fxzip.graphs import bind_inputs
from fxzip.passes.align import Alignment
from fxzip.passes.cut import MergePlan, on_one_sample
from fxzip.passes.permute import permute, random_permutations
from fxzip.passes.split import split
from fxzip.passes.verify.freeze import without_spaces
from fxzip.passes.verify.maps import true_maps, without_left_out
from fxzip.passes.verify.precision import Precision, own_precision
from fxzip.passes.verify.reference import Reference, error_of, reference, run
from fxzip.report import Verified

SAMPLES, MORE, SMALL = 2, 64, 2**20
"""Samples that are checked on; more for networks of so few parameters, where ReLUs may let nothing through for two."""


@dataclass(frozen=True, eq=False)
class Verifier:
    """Checks of one network's channel spaces.

    Attributes:
        module: The traced network.
        example: Inputs of it (args, kwargs).
        seed: Of the permutations.
    """

    module: fx.GraphModule
    example: Inputs
    seed: int = 0

    @cached_property
    def _reference(self) -> Reference:
        return reference(self.module, self.example, self._samples, self._generator())

    @property
    def _samples(self) -> int:
        return MORE if sum(p.numel() for p in self.module.parameters()) < SMALL else SAMPLES

    @property
    def precision(self) -> Precision:
        """What the checks are computed in."""
        return self._reference.precision

    def _generator(self) -> Generator:
        return Generator().manual_seed(self.seed)

    def _orders(self, spec: ChannelSpec, moved: Collection[str] | None) -> dict[str, Tensor]:
        """A random order of the channels of each space, as they are where a space is not among ``moved``."""
        orders = random_permutations(spec, self._generator())
        keep = () if moved is None else [name for name in orders if name not in moved]
        return orders | {name: torch.arange(len(orders[name])) for name in keep}

    def permutation_error(self, spec: ChannelSpec, moved: Collection[str] | None = None) -> float:
        """How far the network with permuted channels is off; ``moved`` are the spaces to permute, None for all."""
        other = permute(spec, self._reference.module, self._orders(spec, moved))
        return error_of(self._reference.outputs, run(other, self._reference.inputs))

    def merge_error(self, plan: MergePlan, moved: Collection[str] | None = None) -> float:
        """How far the network merged with its permuted copy is off, as ``plan`` merges, by the true maps."""
        orders, known = self._orders(plan.spec, moved), self._reference
        if plan.resized is not None:
            known = self._without_left_out(plan, orders)
        other = permute(plan.spec, known.module, orders)
        assert isinstance(other, fx.GraphModule)
        shared = tuple((names[0], names[0]) for names in plan.alignment.shared)
        alignment = Alignment((known.module, other), shared, plan.alignment.parting)
        own = replace(plan, alignment=alignment, maps=true_maps(plan, orders, self._generator()))
        if plan.resized is not None:
            own = replace(own, resized=replace(plan.resized, module=self._like(known, plan.resized.module)))
        return self._error_of_heads(own, known)

    def _like(self, known: Reference, module: fx.GraphModule) -> fx.GraphModule:
        """A resized network in the reference's dtype, with its constants: they are in no state dict or merge."""
        copied, constants = self.precision.copied(module), dict(known.module.named_buffers())
        for name, buffer in copied.named_buffers():
            if buffer.shape == constants[name].shape:
                buffer.copy_(constants[name])
        return copied

    def _without_left_out(self, plan: MergePlan, orders: Mapping[str, Tensor]) -> Reference:
        """A reference that makes nothing of the channels that a plan leaves out."""
        module = copy.deepcopy(self._reference.module)
        without_left_out(plan, module, orders, self._generator())
        return replace(self._reference, module=module, outputs=run(module, self._reference.inputs))

    def _error_of_heads(self, plan: MergePlan, known: Reference) -> float:
        """How far the heads are off; infinite where trunk or heads do not run, as if they gave another shape."""
        parts = split(plan)
        try:
            crossing = run(parts.trunk, known.inputs)
            return max(error_of(known.outputs, run(head, crossing)) for head in parts.heads)
        except (RuntimeError, IndexError):
            return float("inf")

    def checked_spec(self, spec: ChannelSpec) -> tuple[ChannelSpec, Verified]:
        """The spec, without spaces whose permutation changes the function; what was found.

        Raises:
            VerificationError: The function still changes.

        Warns:
            FrozenSpaceWarning: Spaces are to blame; the warning names them and the nodes where they lie.
        """
        error = self.permutation_error(spec)
        if self.allows(error):
            return spec, Verified(str(self.precision), error)
        fixed = self._without(spec, lambda moved: self.permutation_error(spec, moved), "permuting its channels", error)
        left = self.permutation_error(fixed)
        if not self.allows(left):
            raise VerificationError(
                f"the network with its channels in another order is off by {left:.1e} of its outputs, more than "
                f"{self.precision.tolerance:.0e}: fxzip misread its graph. This is a bug in fxzip; verify=False skips "
                "this check"
            )
        return fixed, Verified(str(self.precision), left, frozen=_gone(spec, fixed))

    def without_faults(self, plan: MergePlan, error: float) -> ChannelSpec:
        """The plan's spec without the spaces that are to blame for a self-merge that is off by ``error``.

        Warns:
            FrozenSpaceWarning: It names them and the nodes where they lie.
        """
        return self._without(plan.spec, lambda moved: self.merge_error(plan, moved), "merging it with itself", error)

    def _without(
        self, spec: ChannelSpec, of: Callable[[Collection[str]], float], doing: str, error: float
    ) -> ChannelSpec:
        blamed = self.to_blame(spec, of)
        reason = f"{doing} changed the outputs by {error:.1e}"
        for name in blamed:
            nodes = [node for node in spec.layout.factors if any(s.name == name for s, _, _ in spec.locate(node))]
            where = f" (nodes {', '.join(nodes[:3])}{' ...' if len(nodes) > 3 else ''})" if nodes else ""
            warnings.warn(
                f"channels of {name}{where} are kept in place: {reason}. This is a bug in fxzip's analysis",
                FrozenSpaceWarning, stacklevel=5,
            )  # fmt: skip
        return without_spaces(spec, self.module, blamed, reason)

    def checked_plan(self, spec: ChannelSpec, make: Callable[[ChannelSpec], MergePlan]) -> tuple[MergePlan, float]:
        """A plan by which the network merges with itself, and how far it is off then.

        Args:
            spec: The channel spaces.
            make: Makes the plan from channel spaces; it is called again where some had to be kept in place.

        Raises:
            VerificationError: The merge is still off.

        Warns:
            FrozenSpaceWarning: Spaces are to blame.
        """
        plan = make(spec)
        error = self.merge_error(plan) if plan.maps else 0.0
        if not self.allows(error) and plan.resized is None:
            plan = make(self.without_faults(plan, error))
            error = self.merge_error(plan) if plan.maps else 0.0
        if not self.allows(error):
            raise VerificationError(
                f"the network merged with a permuted copy of itself is off by {error:.1e} of its outputs, more than "
                f"{self.precision.tolerance:.0e}: the merge is wrong. This is a bug in fxzip; try another cut, or "
                "verify=False to skip this check"
            )
        return plan, error

    def allows(self, error: float) -> bool:
        """Whether a difference is no more than what rounding makes of it."""
        return error <= self.precision.tolerance

    def to_blame(self, spec: ChannelSpec, error: Callable[[Collection[str]], float]) -> tuple[str, ...]:
        """Families of spaces without which ``error`` of the rest is allowed, each named by its root.

        Families (blocks, and what lies in them) move together. The first families that fail together are found by
        halving; the last of them is to blame, and the rest is tried again.
        """
        families = [[s.name, *(below.name for below in spec.inside(s.name))] for s in spec.spaces if s.parent is None]
        blamed: list[str] = []

        def fails(count: int) -> bool:
            return not self.allows(error({name for family in families[:count] for name in family}))

        while families and fails(len(families)):
            low, high = 0, len(families)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if fails(middle) else (middle, high)
            blamed.append(families.pop(high - 1)[0])
        return tuple(blamed)


def ensemble_error(alignment: Alignment, spec: ChannelSpec, example: Inputs, place: int) -> float:
    """How far the heads behind an empty trunk are off the models, in the models' own dtype.

    Raises:
        TraceError: A model does not run on a batch of one.
        VerificationError: They are off by more than rounding.

    Args:
        alignment: The models.
        spec: The channel spaces.
        example: Inputs (args, kwargs).
        place: The first valid cut, before which there is nothing but the inputs.
    """
    args, kwargs = with_batch_size(*example, 1)  # nothing is merged, so that one sample tells
    parts = split(MergePlan(alignment, spec, {}, 0, place))
    worst = 0.0
    for module, head in zip(alignment.modules, parts.heads, strict=True):
        inputs = tuple(bind_inputs(module, args, kwargs).values())
        with on_one_sample():
            wanted = run(module, inputs)
        worst = max(worst, error_of(wanted, run(head, run(parts.trunk, inputs))))
    if not worst <= own_precision(alignment.modules[0]).tolerance:
        raise VerificationError(f"the models' heads behind an empty trunk are off by {worst:.1e} of their outputs")
    return worst


def _gone(before: ChannelSpec, after: ChannelSpec) -> tuple[str, ...]:
    kept = {space.name for space in after.spaces}
    return tuple(space.name for space in before.spaces if space.name not in kept)
