"""The users' own modules, without their weights: what merged weights are put back into (`ZippedModel.as_models`)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxzip.data.batches import Inputs, to_device
from fxzip.data.loops import device_of
from fxzip.errors import AlignmentError, OptionError, RestoreError
from fxzip.exported import tensors_in
from fxzip.passes.align import Alignment, align
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.restore import Values, restore
from fxzip.passes.trace import trace
from fxzip.passes.trace.copies import unwrap
from fxzip.report import STITCH

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel

_TOLERANCES = {torch.float64: 1e-7, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Originals:
    """The models that were merged, without the values of their parameters: they take next to no memory.

    They are kept in the process of the merge only: neither `ZippedModel.save` nor pickle keeps them.

    Attributes:
        skeletons: Copies of the modules; None where one cannot be copied.
        alignment: Their graphs.
    """

    skeletons: tuple[nn.Module | None, ...]
    alignment: Alignment

    @classmethod
    def of(cls, models: Sequence[nn.Module], alignment: Alignment) -> Originals:
        """Of models and their graphs, which stay as they are."""
        pairs = zip(models, alignment.modules, strict=True)
        skeletons = tuple(_skeleton(unwrap(model), graph.meta.get("unused", ())) for model, graph in pairs)
        graphs = tuple(_without_values(graph) for graph in alignment.modules)
        return cls(skeletons, Alignment(graphs, alignment.shared, alignment.parting))

    def __deepcopy__(self, memo: Any) -> Originals:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()


def traced_again(models: Sequence[nn.Module], example: Inputs) -> Originals:
    """Of models of the same classes as those that were merged, in another process."""
    graphs = [canonicalise(trace(model, *example)) for model in models]
    return Originals.of(models, align(graphs))


def _skeleton(model: nn.Module, unused: Collection[str]) -> nn.Module | None:
    """A copy of a module whose parameters have no values, but for those that its graph does not have."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if name not in unused:
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses it
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # whatever the user's class raises; the merge needs no copy
        return None


def _without_values(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which what is in the state dict has no values; constants keep theirs."""
    memo: dict[int, Any] = {}
    for tensor in graph.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            empty = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(graph, memo)


# ---- merged weights in them


def as_models(zipped: ZippedModel, models: Any = None) -> dict[str, nn.Module]:
    """For each task a copy of the user's own module with the merged weights; see `ZippedModel.as_models`.

    Raises:
        RestoreError, OptionError: As there.
    """
    if zipped.report.method == STITCH:
        raise RestoreError(
            f"this network is stitched ({zipped.report.cut}): of two networks one goes on from the other's features, "
            "through a map that is part of neither, so it has no original class. The one that gives the trunk is as it "
            "was: take your own; the other is zipped(x, task=...), zipped.select([...]) or what zipped.export gives"
        )
    originals = _originals(zipped, models)
    shared: dict[tuple[str, ...], Tensor] = {}
    made: dict[str, nn.Module] = {}
    for task in zipped.names:
        number = list(zipped.names).index(task) if models is not None else zipped.place(task)
        made[task] = _made(zipped, originals, number, task, shared)
    return made


def _originals(zipped: ZippedModel, models: Any) -> Originals:
    if models is None:
        if zipped.originals is None:
            raise RestoreError(
                "this merged network does not know the models' own classes, as it was loaded, unpickled, "
                "merged from a merged one or from networks of different widths: give models of these classes, with any "
                "weights: zipped.as_models([model_a, model_b]); or its norms were written without scales "
                "(linearise=True, or method='pca'), which the classes cannot hold"
            )
        return zipped.originals
    given = [models[name] for name in zipped.names if name in models] if isinstance(models, Mapping) else list(models)
    if len(given) != len(zipped.names) or not all(isinstance(model, nn.Module) for model in given):
        raise OptionError(f"give a module for each task, {', '.join(zipped.names)}: as_models([model_a, model_b])")
    if zipped.example is None:
        raise RestoreError("the merged network has no example of its inputs, on which its weights could be checked")
    return traced_again(given, zipped.example)


def _made(
    zipped: ZippedModel, originals: Originals, number: int, task: str, shared: dict[tuple[str, ...], Tensor]
) -> nn.Module:
    skeleton, alignment = originals.skeletons[number], originals.alignment
    if skeleton is None:
        raise RestoreError(f"the model of {task} cannot be copied (copy.deepcopy), so no copy can get its weights")
    try:
        names = _names_before_cut(zipped, alignment, number, task)
        with torch.no_grad():
            values = restore({"trunk": zipped.trunk, task: zipped.head(task)}, names, alignment.modules[number])
            model = _written(skeleton, values, shared, device_of(zipped))
    except RestoreError as error:
        raise RestoreError(f"{task} ({type(skeleton).__name__}): {error}") from error
    _check(zipped, model, task, values)
    return model


def _names_before_cut(zipped: ZippedModel, alignment: Alignment, number: int, task: str) -> dict[str, str]:
    """The trunk's names of a model's nodes before the cut, by the model's own."""
    places = {names[number]: place for place, names in enumerate(alignment.shared)}
    crossing = [node.name for node in zipped.head(task).graph.find_nodes(op="placeholder")]
    unknown = [name for name in crossing if name not in places]
    if unknown:
        raise AlignmentError(f"the model of {task} has no {unknown[0]}: it is of another class than the merged one")
    end = 1 + max((places[name] for name in crossing), default=-1)
    return {names[number]: names[0] for names in alignment.shared[:end]}


def _written(
    skeleton: nn.Module, values: Values, shared: dict[tuple[str, ...], Tensor], device: torch.device | None
) -> nn.Module:
    """A copy of a skeleton with values; those of one key are one tensor."""
    model = copy.deepcopy(skeleton).train().eval()  # switching modes clears what some models cache
    tensors = _named(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    dtypes: dict[torch.dtype, torch.dtype] = {}
    for name, tensor in tensors.items():
        found = values.found.get(name) or next(
            (values.found[other] for other in names[id(tensor)] if other in values.found), None
        )
        if found is None:
            continue
        if found.tensor.shape != tensor.shape:
            raise RestoreError(
                f"{name} is of shape {list(tensor.shape)}, and {list(found.tensor.shape)} in the merged network"
            )
        new = shared.get(found.key)
        if new is None or isinstance(new, nn.Parameter) != isinstance(tensor, nn.Parameter):
            new = found.tensor.detach().clone()
            new = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
            shared[found.key] = new
        if tensor.requires_grad:
            new.requires_grad_()
        dtypes[tensor.dtype] = new.dtype
        _put(model, name, new)
    _place_rest(model, set(map(id, shared.values())), dtypes, device)
    return model


def _place_rest(
    model: nn.Module, done: Collection[int], dtypes: Mapping[torch.dtype, torch.dtype], device: torch.device | None
) -> None:
    """Put what the merged network does not have where the rest is."""
    for name, tensor in _named(model).items():
        if id(tensor) in done:
            continue
        if tensor.is_meta:
            raise RestoreError(f"{name} has no counterpart in the merged network")
        moved = tensor.detach().to(device, dtypes.get(tensor.dtype, tensor.dtype))
        _put(model, name, nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved)


def _named(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of another of its kind."""
    owner, _, key = name.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        parent._parameters[key] = tensor
    else:
        parent._buffers[key] = tensor


def _check(zipped: ZippedModel, model: nn.Module, task: str, values: Values) -> None:
    """Run a model beside the merged network on the example.

    Raises:
        RestoreError: They differ.
    """
    dtype, gap = _difference(zipped, model, task)
    if not gap <= _TOLERANCES.get(dtype, _TOLERANCE) and dtype is torch.float32:
        # Deep networks make much of rounding: what is right is right in float64.
        dtype, gap = _difference(copy.deepcopy(zipped).double(), copy.deepcopy(model).double(), task)
    if not gap <= _TOLERANCES.get(dtype, _TOLERANCE):
        why = "".join(f"; {name}: {doubt}" for name, doubt in list(values.doubts.items())[:3])
        raise RestoreError(f"the {type(model).__name__} of {task} would be off by {gap:.1e} of the largest output{why}")


def _difference(zipped: ZippedModel, model: nn.Module, task: str) -> tuple[torch.dtype, float]:
    """The dtype of a head's outputs on the example, and how far a model is off them."""
    if zipped.example is None:
        return torch.float32, 0.0
    args, kwargs = to_device(zipped.example[0], zipped.example[1], device_of(zipped))
    with torch.no_grad():
        expected, found = tensors_in(zipped(*args, task=task, **kwargs)), tensors_in(model(*args, **kwargs))
    gap = max(map(_gap, expected, found), default=0.0) if len(expected) == len(found) else float("inf")
    return expected[0].dtype if expected else torch.float32, gap


def _gap(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).max()
    size = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else torch.ones(())
    return float(gap / size.clamp(min=1e-12))
