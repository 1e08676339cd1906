"""Steps with weights: convolutions, linear layers, norms, products; as modules, functions and operators."""

from __future__ import annotations

from tests.fuzz.builder import CHANNELS, Builder, Failed
from tests.fuzz.vocabulary import step

POINTWISE = """
F.relu({v}) F.gelu({v}) F.silu({v}) F.softplus({v}) {v}.tanh() {v}.sigmoid() F.hardswish({v}) F.leaky_relu({v},0.1)
F.elu({v}) F.mish({v}) F.hardtanh({v}) {v}.clamp(-0.6,0.8) {v}.abs() {v}.square() (-{v}*{v}).exp() {v}.sin() 1-{v}
{v}*0.5+0.1 {v}.clamp_min(0) F.logsigmoid({v}) F.softsign({v}) F.celu({v}) F.selu({v}) F.relu6({v}) torch.erf({v})
{v}/({v}.abs()+1) torch.maximum({v},torch.zeros_like({v})) {v}.mul(2) {v}.pow(2)
""".split()
MODULES = "ReLU GELU SiLU Softplus Tanh Sigmoid Hardswish LeakyReLU ELU Mish Identity Dropout ReLU6".split()


def activation(b: Builder, v: str) -> str:
    """A function of each element, in one of its forms."""
    if b.chance(0.25):
        return b.add(f"{b.part(f'nn.{b.choose(*MODULES)}()')}({v})")
    return b.add(b.choose(*POINTWISE).format(v=v).replace(",", ", ").replace("*", " * "))


def maybe_activation(b: Builder, v: str, share: float = 0.6) -> str:
    return activation(b, v) if b.chance(share) else v


def conv(b: Builder, v: str, out: int | None = None, same: bool = False) -> str:
    """A convolution of a (B, C, L) or (B, C, H, W) variable; ``same``: pixels stay as many."""
    dims = b.values[v].dim() - 2
    inside = b.shape(v)[1]
    out = out or b.number(2, CHANNELS)
    kernel = b.choose(1, 1, 3, 3, 3, 5)
    groups = 1
    if b.chance(0.3):
        if b.chance(0.4) and inside <= CHANNELS:
            groups = inside
            out = inside if out % inside else out
        else:
            groups = b.divisor(inside, out)
    options = [f"groups={groups}"] if groups > 1 else []
    dilation = 2 if kernel == 3 and b.chance(0.15) else 1
    padding = dilation * (kernel // 2) if same or b.chance(0.8) else 0
    options += [f"padding={padding}"] if padding else []
    options += [f"dilation={dilation}"] if dilation > 1 else []
    options += ["stride=2"] if not same and b.chance(0.15) else []
    options += ["bias=False"] if b.chance(0.2) else []
    if b.chance(0.2):
        return _functional(b, v, out, inside // groups, kernel, dims, [o for o in options if "bias" not in o])
    if padding and b.chance(0.15):
        options.append(f"padding_mode={b.choose('circular', 'reflect', 'replicate')!r}")
    rest = "".join(f", {option}" for option in options)
    return b.add(f"{b.part(f'nn.Conv{dims}d({inside}, {out}, {kernel}{rest})')}({v})")


def _functional(b: Builder, v: str, out: int, inside: int, kernel: int, dims: int, options: list[str]) -> str:
    weight = b.parameter(out, inside, *[kernel] * dims)
    bias = b.parameter(out) if b.chance(0.5) else "None"
    rest = "".join(f", {option}" for option in options)
    return b.add(f"F.conv{dims}d({v}, {weight}, {bias}{rest})")


def linear(b: Builder, v: str, out: int | None = None) -> str:
    """A linear layer over the last axis."""
    inside = b.shape(v)[-1]
    out = out or b.number(2, CHANNELS)
    form = b.number(0, 7)
    if form == 0:
        return b.add(f"F.linear({v}, {b.parameter(out, inside)}, {b.parameter(out)})")
    if form == 1:
        return b.add(f"{v} @ {b.parameter(inside, out)}")
    if form == 2:
        letters = "abcdefgh"[: b.values[v].dim() - 1]
        return b.add(f'torch.einsum("{letters}i,oi->{letters}o", {v}, {b.parameter(out, inside)})')
    bias = ", bias=False" if b.chance(0.2) else ""
    return b.add(f"{b.part(f'nn.Linear({inside}, {out}{bias})')}({v})")


def over(b: Builder, v: str, axis: int, out: int | None = None) -> str:
    """A linear layer over any axis."""
    rank = b.values[v].dim()
    if axis in (-1, rank - 1):
        return linear(b, v, out)
    inside = b.shape(v)[axis]
    out = out or b.number(2, CHANNELS)
    layer = b.part(f"nn.Linear({inside}, {out})")
    return b.add(f"{layer}({v}.movedim({axis}, -1)).movedim(-1, {axis})")


def layer(b: Builder, v: str, out: int | None = None, same: bool = False) -> str:
    """The layer that is usual for a variable of this rank: channels on axis 1 of 3 or 4 axes, else on the last."""
    rank = b.values[v].dim()
    if rank == 2 or (rank == 3 and b.chance(0.4)):
        return linear(b, v, out)
    if rank in (3, 4):
        return conv(b, v, out, same)
    return linear(b, v, out)


@step(10)
def a_layer(b: Builder) -> None:
    maybe_activation(b, layer(b, b.variable()))


@step(2)
def a_layer_over_some_axis(b: Builder) -> None:
    v = b.variable(3, 4)
    maybe_activation(b, over(b, v, b.number(1, b.values[v].dim() - 1)))


@step(2)
def transposed(b: Builder) -> None:
    v = b.variable(3, 4)
    dims, inside = b.values[v].dim() - 2, b.shape(v)[1]
    groups = b.choose(1, 1, b.divisor(inside), inside)
    out = groups * b.number(1, max(1, CHANNELS // groups))
    kernel, stride = b.choose((2, 2), (1, 1), (3, 1), (3, 2))
    rest = f", stride={stride}" + (f", groups={groups}" if groups > 1 else "") + (", padding=1" if kernel == 3 else "")
    v = b.add(f"{b.part(f'nn.ConvTranspose{dims}d({inside}, {out}, {kernel}{rest})')}({v})")
    maybe_activation(b, v)


@step(2)
def an_einsum(b: Builder) -> None:
    v = b.variable(4)
    _, c, h, w = b.shape(v)
    o = b.number(2, CHANNELS)
    equation, shape = b.choose(
        ("bchw,oc->bohw", (o, c)), ("bchw,hk->bckw", (h, h)), ("bchw,wk->bchk", (w, w)), ("bchw,co->bhwo", (c, o)),
        ("bchw,ochw->bo", (o, c, h, w)), ("bchw,chw->bchw", (c, h, w)), ("bchw,cw->bch", (c, w)),
        ("bchw,cwk->bchk", (c, w, w)),
    )  # fmt: skip
    maybe_activation(b, b.add(f'torch.einsum("{equation}", {v}, {b.parameter(*shape)})'))


@step(3)
def a_layer_again(b: Builder) -> None:
    """A layer that the module has already, on another variable or on its own result."""
    names = [n for n, part in b.module.named_children() if hasattr(part, "weight")]
    if not names:
        raise Failed
    b.add(f"m.{b.choose(*names)}({b.variable()})")


@step(1)
def a_weight_again(b: Builder) -> None:
    """The weight of a layer in another role: transposed, or with another bias."""
    names = [n for n, part in b.module.named_children() if getattr(part, "weight", b.module.training) is not None]
    names = [n for n in names if getattr(getattr(b.module, n), "weight", None) is not None]
    names = [n for n in names if getattr(b.module, n).weight.dim() == 2]
    if not names:
        raise Failed
    v, weight = b.variable(), f"m.{b.choose(*names)}.weight"
    b.add(b.choose(f"{v} @ {weight}", f"F.linear({v}, {weight})", f"F.linear({v}, {weight}.t())"))


@step(6)
def a_norm(b: Builder) -> None:
    v = b.variable()
    shape = list(b.shape(v))
    rank, channels, last = len(shape), shape[1], shape[-1]
    dims = max(1, rank - 2)
    groups = b.divisor(channels)
    own = b.choose(
        f"nn.BatchNorm{dims}d({channels})", f"nn.BatchNorm{dims}d({channels})", f"nn.LayerNorm({last})",
        f"nn.LayerNorm({shape[1:]})", f"nn.GroupNorm({groups}, {channels})", f"nn.GroupNorm(1, {channels})",
        f"nn.InstanceNorm{dims}d({channels}, affine=True, track_running_stats={b.chance(0.5)})",
        f"nn.RMSNorm({last})", "nn.LocalResponseNorm(3)", f"nn.PReLU({channels})", "nn.Softmax(1)",
    )  # fmt: skip
    maybe_activation(b, b.add(f"{b.part(own)}({v})"), 0.4)


@step(2)
def a_norm_by_function(b: Builder) -> None:
    v = b.variable()
    shape = list(b.shape(v))
    channels, last = shape[1], shape[-1]
    b.add(
        b.choose(
            f"F.normalize({v}, dim=1)", f"F.normalize({v}, dim=-1)", f"F.layer_norm({v}, {shape[1:]})",
            f"F.layer_norm({v}, ({last},), {b.parameter(last)}, {b.parameter(last)})",
            f"F.group_norm({v}, {b.divisor(channels)}, {b.parameter(channels)})",
            f"{v} / ({v}.std(1, keepdim=True) + 0.1)", f"{v} - {v}.mean(1, keepdim=True)", f"{v}.softmax(1)",
            f"{v}.softmax(-1)", f"{v} / ({v}.norm(dim=-1, keepdim=True) + 0.1)", f"{v}.log_softmax(1)",
            f"F.instance_norm({v})",
        )
    )  # fmt: skip


@step(2)
def glu(b: Builder) -> None:
    v = b.variable()
    axis = b.choose(1, -1)
    if b.shape(v)[axis] % 2:
        v = over(b, v, axis, 2 * b.number(2, CHANNELS // 2))
    b.add(f"F.glu({v}, {axis})")


@step(1)
def parametrized(b: Builder) -> None:
    v = b.variable()
    inside, last, rank = b.shape(v)[1], b.shape(v)[-1], b.values[v].dim()
    plain = f"nn.Conv2d({inside}, {b.number(2, CHANNELS)}, 1)" if rank == 4 else f"nn.Linear({last}, {CHANNELS})"
    how = b.choose("weight_norm", "spectral_norm", "orthogonal")
    b.add(f"{b.part(f'parametrizations.{how}({plain})')}({v})")
