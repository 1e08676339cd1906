"""Steps where values meet: sums, gates, attention, products, constants, learned maps; and operations without a rule."""

from __future__ import annotations

from tests.fuzz.builder import CHANNELS, Builder, Failed
from tests.fuzz.layers import activation, layer, linear, maybe_activation
from tests.fuzz.moves import moved
from tests.fuzz.vocabulary import step


@step(5)
def a_residual(b: Builder) -> None:
    """Layers whose result is added to what they began with."""
    v = b.variable(3, 4)
    channels = b.shape(v)[1]
    inner = layer(b, maybe_activation(b, layer(b, v, same=True)), same=True) if b.chance(0.5) else v
    inner = layer(b, inner, channels, same=True)
    if b.shape(inner) != b.shape(v):
        raise Failed
    b.add(b.choose(f"{v} + {inner}", f"{inner} + {v}", f"F.relu({v} + {inner})", f"{v}.add({inner})", f"{inner} - {v}"))


@step(2)
def a_padded_shortcut(b: Builder) -> None:
    v = b.variable(4)
    extra = b.number(1, 4)
    inner = layer(b, v, b.shape(v)[1] + 2 * extra, same=True)
    shortcut = b.choose(
        f"F.pad({v}, (0, 0, 0, 0, {extra}, {extra}))", f"F.pad({v}, (0, 0, 0, 0, 0, {2 * extra}))",
        f"torch.cat([{v}, {v}.new_zeros({v}.shape[0], {2 * extra}, {b.shape(v)[2]}, {b.shape(v)[3]})], 1)",
    )  # fmt: skip
    b.add(b.choose(f"{shortcut} + {inner}", f"{inner} + {shortcut}", f"F.relu({shortcut} + {inner})"))


@step(4)
def two_that_fit(b: Builder) -> None:
    v = b.variable()
    other = b.like(v)
    b.add(
        b.choose(
            f"{v} + {other}", f"{v} * {other}", f"{v} * {other}.sigmoid()", f"torch.maximum({v}, {other})",
            f"torch.where({v} > 0, {v}, {other})", f"torch.cat([{v}, {other}], 1)", f"torch.lerp({v}, {other}, 0.3)",
            f"torch.stack([{v}, {other}], 1).mean(1)", f"torch.cat([{v}, {other}], -1)",
            f"torch.addcmul({v}, {v}, {other})",
            f"sum([{v}, {other}])", f"torch.stack([{v}, {other}], 2).flatten(1, 2)",
        )
    )  # fmt: skip


@step(4)
def a_gate(b: Builder) -> None:
    v = b.variable(4)
    channels = b.shape(v)[1]
    kind = b.number(0, 3)
    if kind == 0:
        squeezed = b.add(f"{v}.mean((2, 3), keepdim=True)")
        hidden = b.number(2, 6)
        down, up = b.part(f"nn.Conv2d({channels}, {hidden}, 1)"), b.part(f"nn.Conv2d({hidden}, {channels}, 1)")
        b.add(f"{v} * {up}(F.relu({down}({squeezed}))).sigmoid()")
    elif kind == 1:
        gate = b.part(f"nn.Linear({channels}, {channels})")
        b.add(f"{v} * {gate}({v}.mean((2, 3)))[:, :, None, None].sigmoid()")
    elif kind == 2:
        spatial = b.part("nn.Conv2d(2, 1, 3, padding=1)")
        b.add(f"{v} * {spatial}(torch.cat([{v}.mean(1, keepdim=True), {v}.amax(1, keepdim=True)], 1)).sigmoid()")
    else:
        eca = b.part("nn.Conv1d(1, 1, 3, padding=1)")
        b.add(f"{v} * {eca}({v}.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[:, :, None, None]")


def tokens(b: Builder) -> str:
    """A variable of (B, T, C)."""
    v = b.variable(3, 4)
    return v if b.values[v].dim() == 3 else b.add(b.choose(f"{v}.flatten(2).mT", f"{v}.flatten(2)"))


@step(4)
def attention(b: Builder) -> None:
    v = tokens(b)
    inside, width, heads = b.shape(v)[-1], b.choose(4, 6, 8), b.choose(1, 2)
    if b.chance(0.5):
        packed = b.part(f"nn.Linear({inside}, {3 * width})")
        split = b.choose(
            f"{packed}({v}).unflatten(-1, (3, {heads}, -1)).permute(2, 0, 3, 1, 4)",
            f"(t.unflatten(-1, ({heads}, -1)).transpose(1, 2) for t in {packed}({v}).chunk(3, -1))",
        )
        q, k, w = b.parts_of(split, 3)
    else:
        q, k, w = (b.add(f"{b.part(f'nn.Linear({inside}, {width})')}({v}).unflatten(-1, ({heads}, -1)).transpose(1, 2)")
                   for _ in range(3))  # fmt: skip
    out = b.add(b.choose(
        f"F.scaled_dot_product_attention({q}, {k}, {w})", f"({q} @ {k}.mT * 0.5).softmax(-1) @ {w}",
        f"F.scaled_dot_product_attention({q}, {k}, {w}, is_causal=True)",
        f'torch.einsum("bhij,bhjd->bhid", ({q} @ {k}.mT).softmax(-1), {w})',
        f"{q} @ ({k}.mT.softmax(-1) @ {w})",
    ))  # fmt: skip
    out = b.add(f"{out}.transpose(1, 2).flatten(2)")
    out = b.add(f"{b.part(f'nn.Linear({width}, {inside})')}({out})")
    if b.chance(0.6):
        b.add(f"{v} + {out}")


@step(2)
def learned_queries(b: Builder) -> None:
    v = tokens(b)
    width, count = b.shape(v)[-1], b.number(1, 4)
    queries = b.parameter(count, width) if b.chance(0.5) else b.parameter(1, count, width)
    kind = b.number(0, 3)
    if kind == 0:
        b.add(f"({queries} @ {v}.mT).softmax(-1) @ {v}")
    elif kind == 1:
        query, key = b.part(f"nn.Linear({width}, {width})"), b.part(f"nn.Linear({width}, {width})")
        b.add(f"F.scaled_dot_product_attention({query}({queries}).expand({v}.shape[0], -1, -1), {key}({v}), {v})")
    elif kind == 2:
        z = b.add(f"{queries}.expand({v}.shape[0], -1, -1)")
        b.add(f"{z} + ({b.part(f'nn.Linear({width}, {width})')}({z}) @ {v}.mT).softmax(-1) @ {v}")
    else:
        b.add(f"({v} * {b.parameter(width)}).sum(-1, keepdim=True).softmax(1) * {v}")


@step(2)
def class_token(b: Builder) -> None:
    v = tokens(b)
    _, count, width = b.shape(v)
    v = b.add(f"torch.cat([{b.parameter(1, 1, width)}.expand({v}.shape[0], -1, -1), {v}], 1)")
    v = b.add(f"{v} + {b.parameter(1, count + 1, width)}") if b.chance(0.7) else v
    if b.chance(0.3):
        b.add(b.choose(f"{v}[:, 0]", f"{v}[:, 1:]", f"{v}[:, 0] + {v}[:, 1:].mean(1)"))


@step(4)
def a_map(b: Builder) -> None:
    """A parameter that meets a variable: a position embedding, a layer scale, a mask."""
    v = b.variable()
    shape = [1 if b.chance(0.4) else size for size in b.shape(v)[1:]]
    if not any(size > 1 for size in shape):
        shape = list(b.shape(v)[1:])
    full = [1, *shape] if b.chance(0.5) else shape
    own = b.parameter(*full)
    own = b.choose(own, own, own, f"{own}.sigmoid()", f"{own}.flip(-1)", f"F.softplus({own})", f"{own}.softmax(-1)")
    b.add(b.choose(f"{v} + {own}", f"{v} * {own}", f"{v} * (1 + {own})", f"torch.maximum({v}, {own})", f"{own} - {v}"))


@step(2)
def a_layer_on_a_parameter(b: Builder) -> None:
    v = b.variable()
    last, hidden = b.shape(v)[-1], b.number(2, 8)
    rows = list(b.shape(v)[1:-1]) if b.chance(0.5) else []
    own = b.parameter(*rows, hidden)
    made = f"{b.part(f'nn.Linear({hidden}, {last})')}({own})"
    b.add(b.choose(f"{v} + {made}", f"{v} * {made}", f"F.relu({v} + {made})", f"{v} * {made}.sigmoid()"))


@step(2)
def a_constant(b: Builder) -> None:
    v = b.variable()
    shape = b.shape(v)
    last, channels = shape[-1], shape[1]
    rest = ", None" * (len(shape) - 2)
    buffer = f"m.{b.choose('buffer', 'mask', 'table')}"
    if not hasattr(b.module, buffer[2:]):
        b.line(f'm.register_buffer("{buffer[2:]}", torch.randn({", ".join(map(str, shape[1:]))}))')
    b.add(b.choose(
        f"{v} + torch.linspace(-1, 1, {last}, dtype={v}.dtype)", f"{v} * torch.ones_like({v})", f"{v} + {buffer}",
        f"{v} * torch.linspace(0.5, 1, {channels}, dtype={v}.dtype)[:{rest}]", f"{v} + torch.arange({last})",
        f"torch.cat([{v}, torch.ones_like({v}[:, :1])], 1)", f"{v}.masked_fill({v} > 1, 0.5)",
        f"torch.cat([{v}, torch.zeros_like({v})], 1)", f"{v} * ({buffer} > 0)",
    ))  # fmt: skip


@step(2)
def a_product(b: Builder) -> None:
    v = tokens(b)
    _, count, width = b.shape(v)
    other = maybe_activation(b, linear(b, v), 0.3)
    b.add(b.choose(
        f"{v} @ {v}.mT", f"{v}.mT @ {v}", f"{v}.mT @ {other}", f"torch.cdist({v}, {other[:0]}{v}.flip(1))",
        f"torch.einsum('btc,btd->bcd', {v}, {other})", f"torch.cdist({v}, {b.parameter(b.number(2, 5), width)})",
        f"{v}[:, :, :, None] * {other}[:, :, None]", f"torch.bmm({v}.mT, {v}) / {count}",
        f"F.cosine_similarity({v}[:, :, None], {v}[:, None], -1)",
    ))  # fmt: skip


@step(2)
def two_layers_multiplied(b: Builder) -> None:
    v = b.variable()
    out = b.number(2, CHANNELS)
    one, two = layer(b, v, out, same=True), layer(b, v, out, same=True)
    if b.shape(one) == b.shape(two):
        b.add(b.choose(f"{one} * {two}", f"{one} * {two}.sigmoid()", f"{one}.tanh() * {two} + {one}"))


@step(2)
def without_a_rule(b: Builder) -> None:
    v = b.variable()
    shape = b.shape(v)
    axis = b.number(1, len(shape) - 1)
    order = b.random.sample(range(shape[axis]), shape[axis])
    some = ":, " * axis + f"{order}"
    b.add(b.choose(
        f"{v}.cumsum({axis})", f"{v}.sort({axis})[0]", f"{v}.topk(2, {axis})[0]", f"torch.fft.rfft({v}).abs()",
        f"{v}.logcumsumexp({axis})", f"{v}.median({axis}, keepdim=True)[0]", f"torch.tril({v})", f"{v}[{some}]",
        f"{v}.cummax({axis})[0]", f"torch.nn.functional.fold({v}.flatten(1)[:, :, None], (1, 1), 1)",
        f"{v}.argmax({axis}, keepdim=True) * 0.1 + {v}", f"{v}.index_add({axis}, torch.tensor({order}), {v})",
        f"{v}.index_copy({axis}, torch.tensor({order[:1]}), {v}.narrow({axis}, 0, 1) * 2)",
        f"torch.trapezoid({v}, dim={axis})[:, None]", f"{v}.kthvalue(1, {axis}, keepdim=True)[0] + {v}",
        f"{v}.var({axis}, keepdim=True)", f"torch.atan2({v}, {v}.roll(1, {axis}))", f"{v}.renorm(2, 0, 1.0)",
        f"F.threshold({v}, 0.1, 0.0)", f"torch.special.i0e({v})", f"{v}.scatter({axis}, {v}.argsort({axis}), {v})",
    ))  # fmt: skip


@step(1)
def opaque_module(b: Builder) -> None:
    v = tokens(b)
    width = b.shape(v)[-1]
    kind = b.number(0, 3)
    if kind == 0:
        recurrent = b.part(f"nn.{b.choose('LSTM', 'GRU')}({width}, {b.number(2, 8)}, batch_first=True)")
        b.add(f"{recurrent}({v})[0]")
    elif kind == 1:
        heads = b.divisor(width) if b.chance(0.5) else 1
        b.add(f"{b.part(f'nn.MultiheadAttention({width}, {heads}, batch_first=True)')}({v}, {v}, {v})[0]")
    elif kind == 2:
        b.add(f"{b.part(f'nn.Bilinear({width}, {width}, {b.number(2, 8)})')}({v}, {v}.flip(1))")
    else:
        b.add(f"{b.part(f'nn.TransformerEncoderLayer({width}, 1, 8, batch_first=True)')}({v})")


@step(1)
def shuffled_groups(b: Builder) -> None:
    """Groups of different numbers in a row."""
    v = b.variable(4)
    channels = b.shape(v)[1]
    wide = b.choose(6, 8, 12)
    one = b.part(f"nn.Conv2d({channels}, {wide}, 1, groups={b.divisor(channels, wide)})")
    v = b.add(f"{one}({v})")
    v = b.add(b.choose(v, moved(b, v), f"F.channel_shuffle({v}, {b.divisor(wide)})", f"torch.cat([{v}, {v}], 1)"))
    channels = b.shape(v)[1]
    wide = b.choose(6, 8, 12)
    activation(b, b.add(f"{b.part(f'nn.Conv2d({channels}, {wide}, 1, groups={b.divisor(channels, wide)})')}({v})"))
