"""Steps that move values: whole, in parts, and some channels otherwise than others."""

from __future__ import annotations

from tests.fuzz.builder import Builder, Failed
from tests.fuzz.layers import activation, layer
from tests.fuzz.vocabulary import step


def moved(b: Builder, v: str) -> str:
    """An expression of the same shape as ``v``, with values at other places."""
    shape = b.shape(v)
    axis = b.number(1, len(shape) - 1)
    size, channels, last = shape[axis], shape[1], shape[-1]
    order = b.random.sample(range(size), size)
    options = [
        f"{v}.roll({b.number(1, 2)}, {axis})", f"{v}.flip({axis})", f"{v}[{':, ' * axis}{order}]",
        f"torch.cat([{v}.narrow({axis}, 1, {size - 1}), {v}.narrow({axis}, 0, 1)], {axis})",
        f"{v}.index_select({axis}, torch.tensor({order}))",
        f"torch.stack({v}.unbind({axis})[::-1], {axis})",
        f"torch.cat({v}.chunk(2, {axis})[::-1], {axis})",
    ]  # fmt: skip
    if len(shape) == 4:
        options.append(f"F.channel_shuffle({v}, {b.divisor(channels)})")
        if shape[2] == last:
            options += [f"{v}.mT", f"{v}.rot90({b.choose(1, 2, -1)}, (2, 3))"]
        options.append(f"F.pad({v}, (1, 0, 0, 0))[..., :-1]")
        options.append(f"F.pad({v}[:, :, 1:], (0, 0, 0, 1))")
    if channels % 2 == 0:
        rest = ", ".join(map(str, shape[2:]))
        options.append(f"{v}.view({v}.shape[0], 2, {channels // 2}, {rest or '1'}).transpose(1, 2).reshape({v}.shape)")
        options.append(f"{v}.unflatten(1, (2, -1)).flip(1).flatten(1, 2)")
    return str(b.choose(*options))


def other_shape(b: Builder, v: str) -> str:
    """An expression whose shape may be another."""
    shape = b.shape(v)
    axis = b.number(1, len(shape) - 1)
    size = shape[axis]
    lead = ":, " * axis
    start, stop = sorted((b.number(0, size // 2), b.number(size // 2 + 1, size)))
    options = [
        f"{v}[{lead}{start}:{stop}]", f"{v}[{lead}::2]", f"{v}[{lead}1::2]",
        f"{v}.narrow({axis}, {start}, {stop - start})",
        f"{v}[{lead}{b.random.choices(range(size), k=b.number(1, size))}]",
        f"torch.cat([{v}, {v}], {axis})", f"torch.cat([{v}, -{v}], {axis})", f"{v}.repeat_interleave(2, {axis})",
        f"torch.cat([{v}, torch.zeros_like({v})], {axis})",
        f"{v}.tile({', '.join('2' if a == axis else '1' for a in range(len(shape)))})",
        f"{v}.repeat({', '.join('2' if a == axis else '1' for a in range(len(shape)))})",
        f"{v}.mean({axis})", f"{v}.amax({axis}, keepdim=True)", f"{v}.sum({axis}, keepdim=True)",
        f"{v}.movedim({axis}, 1)", f"{v}.transpose(1, {axis})", f"{v}.flatten(1)",
        f"torch.stack([{v}, {v} * 2], {axis})", f"{v}.max({axis})[0]", f"{v}.unsqueeze({axis})",
    ]  # fmt: skip
    if len(shape) > 2:
        first = b.number(1, len(shape) - 2)
        options += [f"{v}.flatten({first}, {first + 1})", f"{v}.flatten({first}, {first + 1})", f"{v}.flatten(2)"]
        options += [f"{v}.transpose({first}, {first + 1})", f"{v}.flatten(2).mT", f"{v}[..., 0]", f"{v}[:, :, -1]"]
    if len(shape) == 4:
        options += [
            f"F.max_pool2d({v}, 2)", f"F.avg_pool2d({v}, 3, 1, 1)", f"F.adaptive_avg_pool2d({v}, {b.number(1, 2)})",
            f"F.interpolate({v}, scale_factor=2)",
            f"F.pad({v}, (1, 1, 1, 1), mode='{b.choose('reflect', 'circular')}')",
            f"F.pad({v}, (0, 1), value=0.5)", f"F.pad({v}, (0, 0, 0, 0, 1, 1))", f"F.pixel_shuffle({v}, 2)",
            f"F.pixel_unshuffle({v}, 2)", f"{v}[:, :, 1:-1, 1:-1]", f"F.unfold({v}, 2)", f"F.unfold({v}, 2, stride=2)",
            f"{v}.unfold(2, 2, 2)", f"{v}.permute(0, 2, 3, 1)", f"{v}.permute(0, 3, 1, 2)",
            f"F.lp_pool2d({v}, 2, 2)", f"torch.cat([F.max_pool2d({v}, 2), F.avg_pool2d({v}, 2)], 1)",
            f"torch.cat([{v}[:, :, ::2, ::2], {v}[:, :, 1::2, ::2], {v}[:, :, ::2, 1::2]], 1)",
            f"{v}[:, :, :-1] - {v}[:, :, 1:]", f"{v}[:, 1:] - {v}[:, :-1]", f"torch.diff({v}, dim=1)",
        ]  # fmt: skip
    if size % 2 == 0:
        options.append(f"{v}.unflatten({axis}, (2, -1))")
        options.append(f"{v}.unflatten({axis}, (-1, 2)).amax({axis + 1})")
        options.append(f"torch.maximum(*{v}.chunk(2, {axis}))")
        options.append(f"torch.stack({v}.chunk(2, {axis}), 1)")
    return str(b.choose(*options))


@step(5)
def a_move(b: Builder) -> None:
    b.add(moved(b, b.variable()))


@step(7)
def a_change_of_shape(b: Builder) -> None:
    b.add(other_shape(b, b.variable()))


@step(3)
def a_sum_with_itself_moved(b: Builder) -> None:
    v = b.variable()
    b.add(f"{v} {b.choose('+', '+', '*', '-')} {moved(b, v)}")


@step(3)
def some_channels_moved(b: Builder) -> None:
    """Part of the channels is moved, a layer or a function is applied to it; the rest stays."""
    v = b.variable(fits=lambda v: v.shape[1] >= 4)
    size = b.shape(v)[1]
    at = b.choose(size // 2, b.number(1, size - 1))
    left, right = b.parts_of(f"{v}.split([{at}, {size - at}], 1)", 2) if b.chance(0.5) else b.parts_of(
        f"{v}[:, :{at}], {v}[:, {at}:]", 2
    )  # fmt: skip
    one = b.choose(left, right)
    how = b.number(0, 3)
    if how == 0:
        new = b.add(moved(b, one))
    elif how == 1:
        new = activation(b, one)
    elif how == 2:
        new = layer(b, one, b.shape(one)[1], same=True)
    else:
        new = b.add(other_shape(b, one))
    left, right = (new if one == name else name for name in (left, right))
    if b.chance(0.2):
        left, right = right, left
    b.add(f"torch.cat([{left}, {right}], 1)")


@step(3)
def parts_swapped(b: Builder) -> None:
    v = b.variable(fits=lambda v: v.shape[1] % 2 == 0)
    one, two = b.parts_of(f"{v}.chunk(2, 1)", 2)
    if b.chance(0.5):
        one = activation(b, one)
    b.add(
        b.choose(
            f"torch.cat([{two}, {one}], 1)", f"{one} * {two}", f"torch.stack([{two}, {one}], 2).flatten(1, 2)",
            f"torch.cat([{one}, {one} + {two}], 1)", f"torch.maximum({one}, {two})", f"{one} + {two}.flip(1)",
            f"torch.cat([{one}, {two}, {one}], 1)",
        )
    )  # fmt: skip


@step(2)
def other_pixels(b: Builder) -> None:
    """Half of the channels at some pixels, the others at others."""
    v = b.variable(4, fits=lambda v: v.shape[1] >= 2 and min(v.shape[2:]) >= 2)
    at = b.number(1, b.shape(v)[1] - 1)
    one, two = b.random.sample(["::2, ::2", "1::2, ::2", "::2, 1::2", "1::2, 1::2"], 2)
    b.add(f"torch.cat([{v}[:, :{at}, {one}], {v}[:, {at}:, {two}]], 1)")


@step(2)
def to_tokens_and_back(b: Builder) -> None:
    v = b.variable(4)
    h = b.shape(v)[2]
    tokens = b.add(f"{v}.flatten(2).transpose(1, 2)")
    tokens = layer_of_tokens(b, tokens)
    if b.chance(0.6):
        b.add(f"{tokens}.transpose(1, 2).unflatten(2, ({h}, -1))")


def layer_of_tokens(b: Builder, v: str) -> str:
    kind = b.number(0, 2)
    if kind == 0:
        return b.add(f"{b.part(f'nn.LayerNorm({b.shape(v)[-1]})')}({v})")
    inside = b.shape(v)[-1]
    return b.add(f"{b.part(f'nn.Linear({inside}, {b.choose(inside, b.number(2, 12))})')}({v})")


@step(2)
def windows(b: Builder) -> None:
    """Windows of pixels, as in window attention, and back."""
    v = b.variable(4, fits=lambda v: v.shape[2] % 2 == 0 and v.shape[3] % 2 == 0)
    _, c, h, w = b.shape(v)
    n = f"{v}.shape[0]"
    b.add(
        b.choose(
            f"{v}.view({n}, {c}, {h // 2}, 2, {w // 2}, 2).permute(0, 2, 4, 3, 5, 1).reshape({n}, -1, {4 * c})",
            f"{v}.view({n}, {c}, {h // 2}, 2, {w // 2}, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)",
            f"{v}.view({n}, {c}, {h // 2}, 2, {w // 2}, 2).amax((3, 5))",
            f"{v}.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))",
            f"F.fold(F.unfold({v}, 2, stride=2), ({h}, {w}), 2, stride=2)",
            f"F.fold(F.unfold({v}, 3, padding=1), ({h}, {w}), 3, padding=1)",
        )
    )  # fmt: skip


@step(1)
def pieces_of_an_axis(b: Builder) -> None:
    v = b.variable(fits=lambda v: v.shape[1] in range(2, 7))
    names = b.parts_of(f"{v}.unbind(1)", b.shape(v)[1])
    if b.values[v].dim() == 2:
        raise Failed
    b.random.shuffle(names)
    b.add(f"torch.{b.choose('stack', 'cat')}([{', '.join(names)}], 1)")
