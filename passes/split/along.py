"""Along: how one model's channels in a node's output are mixed, as a matrix for each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxzip.channels import ChannelSpec, Located, Role
from fxzip.matching import MergeMap
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.split.fuse import Mixing
from fxzip.passes.split.laid import Laid, Move, by_axes, laid_in, moved_along, sizes_along


def along_axes(
    spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, model: int, role: Role, others: float = 1.0,
    trunk: ChannelSpec | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """How one model's channels in a node's output are mixed: a matrix for each axis where there are some, float64.

    Args:
        spec: The channel spaces.
        maps: The maps of those that are merged.
        node: The node, by the first model's name; no space of it lies along several axes at once.
        model: The model.
        role: ``produce`` for M_p, (merged positions, the model's); ``contract`` for U_p, (the model's, merged ones).
        others: The factor for positions that are in no merged space.
        trunk: The merged network's spaces, where they lie elsewhere.
    """
    own = [each for each in spec.locate(node) if each[0].name in maps and each[0].size > 1]
    if trunk is not None and trunk is not spec:
        return _moved_along_axes(spec, maps, node, model, role, others, own, trunk)
    found: dict[int, Tensor] = {}
    rest: dict[int, Tensor] = {}
    for space, axes, index in own:
        (axis,) = axes
        size = sizes_along(spec, node, axes)[0]
        matrix = torch.eye(size, dtype=torch.float64)
        part = maps[space.name].part(model, role)
        for copy in index.T:
            matrix[copy[:, None], copy] = part if role == "produce" else part.T
        found[axis] = matrix @ found[axis] if axis in found else matrix  # tokens by channels, on one axis
        rest.setdefault(axis, torch.full((size, 1), others, dtype=torch.float64))[index.reshape(-1)] = 1.0
    return {axis: rest[axis] * matrix for axis, matrix in found.items()}


def _moved_along_axes(
    spec: ChannelSpec, maps: Mapping[str, MergeMap], node: str, model: int, role: Role, others: float,
    own: Sequence[Located], trunk: ChannelSpec,
) -> dict[int, Tensor]:  # fmt: skip
    """The same where there are other numbers of merged channels."""
    moves = [
        ((axes[0], index), maps[space.name], laid_in(trunk, node, (space, axes, index))) for space, axes, index in own
    ]
    found: dict[int, Tensor] = {}
    for axis in dict.fromkeys(axis for (axis, _), _, _ in moves):
        here = [(index, merge_map, laid) for (at, index), merge_map, laid in moves if at == axis]
        size = sizes_along(spec, node, (axis,))[0]
        if role == "produce":
            each = [Move(index, Mixing(m.size, m.part(model, role)), laid) for index, m, laid in here]
        else:
            back = Laid(here[0][0], (size,))
            each = [Move(laid.index, Mixing.back(m, model), replace(back, index=index)) for index, m, laid in here]
        start = size if role == "produce" else here[0][2].sizes[0]
        matrix = moved_along(torch.eye(start, dtype=torch.float64), (0,), each)
        rest = torch.full((len(matrix), 1), others, dtype=torch.float64)
        for move in each:
            rest[move.into.index.reshape(-1)] = 1.0
        found[axis] = rest * matrix
    return found


def unmerged(plan: MergePlan, node: str, value: Tensor, model: int) -> Tensor:
    """What U finds again of a model's channels in a merged value, where there are other numbers of these."""
    found = []
    for space, axes, index in plan.spec.locate(node):
        merge_map = plan.maps.get(space.name)
        if merge_map is not None and axes:
            laid = laid_in(plan.trunk_spec, node, (space, axes, index))
            into = Laid(index, sizes_along(plan.spec, node, axes))
            found.append((axes, Move(laid.index, Mixing.back(merge_map, model), into)))
    for axes, together in by_axes(found).items():
        value = moved_along(value, axes, together)
    return value
