"""What each operation's arguments say of sizes: the numbers in a graph that follow from how many channels there are.

Each rule takes a `fxzip.rules.sizing.SizedCall` and changes its arguments. Operations without one have no such numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.rules.keys import key_of
from fxzip.rules.sizing import SizedCall, SizeError, size_rule

# ---- sizes of the result


def _out(call: SizedCall, given: Any, first: int = 0) -> Any:
    """Sizes of the result's axes from ``first`` on, nested as they were given."""
    place = iter(range(first, len(call.shape(call.node))))

    def new(value: Any) -> Any:
        axis = next(place)
        if isinstance(value, int) and value < 0:
            return value
        size, old = call.size(call.node, axis), call.shape(call.node)[axis]
        if size == old:
            return value
        return call.scalar(value, old, size) if isinstance(value, fx.Node) else size

    if isinstance(given, Sequence):
        return [new(value) for value in given] if isinstance(given, list) else tuple(map(new, given))
    return new(given)


@size_rule("view", "reshape", "unsafe_view", "view_copy", "expand", "broadcast_to")
def shaped(call: SizedCall) -> None:
    """All sizes of the result, one by one or as a list."""
    for name in ("shape", "size", "sizes"):
        if name in call.kwargs:
            call.kwargs[name] = _out(call, call.kwargs[name])
    if len(call.args) == 2 and isinstance(call.args[1], (tuple, list)):
        call.args[1] = _out(call, call.args[1])
    elif len(call.args) > 1 and not isinstance(call.args[1], torch.dtype):
        call.args[1:] = _out(call, tuple(call.args[1:]))


@size_rule("unflatten")
def unflattened(call: SizedCall) -> None:
    """Sizes of the result from an axis on."""
    axis = call.argument(1, "dim") % len(call.shape(call.source))
    call.give(2, "sizes", _out(call, call.argument(2, "sizes"), axis))


@size_rule(nn.Unflatten)
def unflattened_module(call: SizedCall) -> None:
    """The same, as attributes."""
    module: Any = call.module
    axis = module.dim % len(call.shape(call.source))
    module.unflattened_size = _out(call, tuple(module.unflattened_size), axis)


@size_rule("repeat", "tile")
def repeated(call: SizedCall) -> None:
    """How often each axis is repeated: as often as before, but where there was one channel for all."""
    before, after = call.shape(call.source), call.shape(call.node)
    flat = list(call.args[1] if len(call.args) == 2 and isinstance(call.args[1], (tuple, list)) else call.args[1:])
    if call.kwargs or not flat:
        return
    lead = len(after) - len(before)
    for place in range(len(flat)):
        axis = place + len(after) - len(flat)
        size = call.size(call.source, axis - lead) if axis >= lead else 1
        times, rest = divmod(call.size(call.node, axis), size)
        if rest:
            raise SizeError("an axis is no multiple of what is repeated")
        if isinstance(flat[place], int):
            flat[place] = times
    call.args[1:] = [tuple(flat)] if isinstance(call.args[1], (tuple, list)) else flat


# ---- places on an axis of the input


def _axis(call: SizedCall, place: int, name: str = "dim", default: int = 0) -> int:
    axis: int = call.argument(place, name, default)
    return axis % len(call.shape(call.source))


def _pieces(call: SizedCall, axis: int, sizes: Sequence[int]) -> list[int]:
    """The new sizes of pieces of an axis of the input."""
    found, start = [], 0
    for size in sizes:
        found.append(call.part(call.source, axis, start, start + size))
        start += size
    return found


@size_rule("split", "split_with_sizes")
def divided(call: SizedCall) -> None:
    """The size of each piece, or of all."""
    axis = _axis(call, 2)
    name = next((n for n in ("split_size_or_sections", "split_size", "split_sizes") if n in call.kwargs), "")
    given, total = call.argument(1, name), call.shape(call.source)[axis]
    if not call.changes(call.source, axis):
        return
    even = isinstance(given, int)
    sizes = [min(given, total - k) for k in range(0, total, given)] if even else list(given)
    pieces = _pieces(call, axis, sizes)
    same = even and all(size == pieces[0] for size in pieces[:-1]) and pieces[-1] <= pieces[0]
    call.give(1, name, pieces[0] if same else pieces)


@size_rule("chunk", "tensor_split")
def chunked(call: SizedCall) -> None:
    """Pieces of one size; else they are cut by their sizes."""
    axis, count = _axis(call, 2), call.argument(1, "chunks", call.kwargs.get("sections"))
    if not call.changes(call.source, axis):
        return
    total, size = call.shape(call.source)[axis], call.size(call.source, axis)
    if not isinstance(count, int) or total % count or size % count:
        raise SizeError("it cuts channels into pieces of several sizes")
    step = total // count
    if len(set(_pieces(call, axis, [step] * count))) > 1:
        raise SizeError("its pieces would have several sizes")


@size_rule("narrow")
def narrowed(call: SizedCall) -> None:
    """A start and a length."""
    axis, start, length = _axis(call, 1), call.argument(2, "start"), call.argument(3, "length")
    if not call.changes(call.source, axis):
        return
    call.give(2, "start", call.part(call.source, axis, 0, start % call.shape(call.source)[axis]))
    call.give(3, "length", call.part(call.source, axis, start, start + length))


@size_rule("slice")
def sliced(call: SizedCall) -> None:
    """A start and a stop, as ATen has them."""
    axis = _axis(call, 1)
    if not call.changes(call.source, axis):
        return
    given = slice(call.argument(2, "start"), call.argument(3, "end"), call.argument(4, "step", 1))
    new = _slice(call, axis, given)
    call.give(2, "start", new.start)
    call.give(3, "end", new.stop)


@size_rule("select")
def selected(call: SizedCall) -> None:
    """One position."""
    axis = _axis(call, 1)
    if call.changes(call.source, axis):
        place = call.argument(2, "index") % call.shape(call.source)[axis]
        call.give(2, "index", call.part(call.source, axis, 0, place))


@size_rule("getitem")
def taken(call: SizedCall) -> None:
    """Slices, positions and tensors of indices."""
    source, index = call.args
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return
    parts = list(index) if isinstance(index, tuple) else [index]
    rank = len(call.shape(source))
    used = sum(part is not None and part is not Ellipsis for part in parts)
    axis = 0
    for place, part in enumerate(parts):
        if part is None:
            continue
        if part is Ellipsis:
            axis += rank - used
            continue
        if call.changes(source, axis):
            parts[place] = _index(call, axis, part)
        axis += 1
    call.args[1] = tuple(parts) if isinstance(index, tuple) else parts[0]


def _index(call: SizedCall, axis: int, part: Any) -> Any:
    if isinstance(part, slice):
        return _slice(call, axis, part)
    if isinstance(part, int):
        return call.part(call.args[0], axis, 0, part % call.shape(call.args[0])[axis])
    raise SizeError("channels are taken by a tensor of indices")


def _slice(call: SizedCall, axis: int, given: slice) -> slice:
    """A slice of channels; its end stays open where it is."""
    source = call.source if call.args else call.kwargs["input"]
    total = call.shape(source)[axis]
    if any(isinstance(end, fx.Node) for end in (given.start, given.stop)) or given.step not in (None, 1):
        raise SizeError("channels are taken in steps, or by a number that depends on the batch")
    start, stop, _ = given.indices(total)
    first = given.start if given.start in (None, 0) else call.part(source, axis, 0, start)
    end = None if given.stop is None else call.part(source, axis, 0, stop)
    kept = call.part(source, axis, start, stop)  # raises where that is no whole part
    assert kept >= 0
    return slice(first, end, given.step)


@size_rule("unbind", "index_select", "gather", "take_along_dim", "roll", "flip", "repeat_interleave", "pixel_shuffle")
def by_places(call: SizedCall) -> None:
    """Operations by the places of channels, which they keep on the other axes."""
    name = str(key_of(call.node.target))
    place = {"roll": 2, "repeat_interleave": 2, "unbind": 1, "index_select": 1, "gather": 1}.get(name)
    dims = range(1, 2) if place is None else call.argument(place, "dims" if name == "roll" else "dim", 0)
    rank = len(call.shape(call.source))
    for axis in [dims] if isinstance(dims, int) else dims or ():
        if call.changes(call.source, axis % rank) and name not in ("pixel_shuffle", "roll", "flip"):
            raise SizeError("channels are taken by their places")


# ---- groups, and attributes of modules


def _groups(call: SizedCall, groups: int) -> int:
    """As many groups as there are more channels: groups are kept or left out as wholes."""
    if groups == 1:
        return 1
    found, rest = divmod(groups * call.size(call.source, 1), call.shape(call.source)[1])
    if rest:
        raise SizeError("there would be a part of a group")
    return found


@size_rule("conv1d", "conv2d", "conv3d")
def conv(call: SizedCall) -> None:
    """The number of groups."""
    call.give(6, "groups", _groups(call, call.argument(6, "groups", 1)))


@size_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(call: SizedCall) -> None:
    """The number of groups."""
    call.give(6, "groups", _groups(call, call.argument(6, "groups", 1)))


@size_rule("convolution")
def convolution(call: SizedCall) -> None:
    """The number of groups, as ATen has it."""
    call.give(8, "groups", _groups(call, call.argument(8, "groups", 1)))


@size_rule("group_norm")
def group_norm(call: SizedCall) -> None:
    """The number of groups."""
    call.give(1, "num_groups", _groups(call, call.argument(1, "num_groups")))


@size_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_module(call: SizedCall) -> None:
    """Channels and groups."""
    module: Any = call.module
    if module.in_channels != call.shape(call.source)[1]:
        return  # called again: it has them already
    groups, size = _groups(call, module.groups), call.size(call.source, 1)
    rows, columns = module.weight.shape[:2]
    module.out_channels = columns * groups if module.transposed else rows
    module.in_channels, module.groups = size, groups


@size_rule(nn.GroupNorm)
def group_norm_module(call: SizedCall) -> None:
    """Channels and groups."""
    module: Any = call.module
    if module.num_channels == call.shape(call.source)[1]:
        module.num_groups = _groups(call, module.num_groups)
        module.num_channels = call.size(call.source, 1)


@size_rule(nn.modules.batchnorm._NormBase)
def norm_module(call: SizedCall) -> None:
    """Channels of BatchNorm and InstanceNorm."""
    module: Any = call.module
    module.num_features = call.size(call.source, 1)


@size_rule(nn.Linear)
def linear_module(call: SizedCall) -> None:
    """Features."""
    module: Any = call.module
    module.out_features, module.in_features = module.weight.shape


@size_rule(nn.Embedding)
def embedding_module(call: SizedCall) -> None:
    """The columns of the table."""
    module: Any = call.module
    module.num_embeddings, module.embedding_dim = module.weight.shape


@size_rule(nn.PReLU)
def prelu_module(call: SizedCall) -> None:
    """A slope for each channel, or one."""
    module: Any = call.module
    module.num_parameters = module.weight.numel()
