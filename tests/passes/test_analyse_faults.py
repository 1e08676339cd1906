"""Kinds of graphs on which the analysis was once wrong: the permutation oracle, and what must be covered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import fxzip
from fxzip.errors import RuleError
from fxzip.labelling.labels import Labelled
from fxzip.rules import RuleContext, registry
from tests.nets import Net

C, T, L = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
Body = Callable[[Net, Tensor], Tensor]
SHAPE = (2, 3, 6, 6)


def after(change: Callable[[Tensor], Tensor]) -> Body:
    """a, then a change of its value, then b, the mean, and the head."""
    return lambda m, x: m.head(F.softplus(m.b(change(F.softplus(m.a(x))))).mean((2, 3)))


def two(width: int = 8, **more: nn.Module) -> dict[str, nn.Module]:
    return {"a": C(3, 8, 3, padding=1), "b": C(width, 6, 1), "head": L(6, 3), **more}


def half(move: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor] = lambda y: y) -> Body:
    """One move for the first four channels, another for the others."""
    return after(lambda y: torch.cat([move(y[:, :4]), other(y[:, 4:])], 1))


def pixel(i: int, j: int) -> Callable[[Tensor], Tensor]:
    return lambda y: y[:, :, i : i + 1, j : j + 1].expand(-1, -1, 6, 6)


def overwritten(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :4, 1:] = y[:, :4, :-1].clone()
    return y


def versions(y: Tensor) -> Tensor:
    whole, turned = y * 1, y.transpose(2, 3)
    return torch.cat([whole[:, :4], turned[:, 4:]], 1)


INDEX = torch.tensor([5, 4, 3, 2, 1, 0])
POSITIONS = {
    "roll": half(lambda y: y.roll(1, 2)),
    "roll over both axes": half(lambda y: y.roll((1, 2), (2, 3))),
    "flip": half(lambda y: y.flip(3)),
    "transpose": half(lambda y: y.transpose(2, 3)),
    "rot90": half(lambda y: y.rot90(1, (2, 3))),
    "crop and pad": half(lambda y: F.pad(y[:, :, 1:], (0, 0, 0, 1))),
    "pad and crop by a constant": half(lambda y: F.pad(y[:, :, :-1], (0, 0, 1, 0), value=2.0)),
    "reflect": half(lambda y: F.pad(y[:, :, 1:], (0, 0, 1, 0), mode="reflect")),
    "strided": half(lambda y: y[:, :, ::2, ::2], lambda y: y[:, :, 1::2, 1::2]),
    "index_select": half(lambda y: y.index_select(2, INDEX)),
    "advanced index": half(lambda y: y[:, :, INDEX]),
    "a pixel expanded": half(pixel(0, 0), pixel(1, 1)),
    "halves of an image swapped": half(lambda y: torch.cat(y.chunk(2, 3)[::-1], 3)),
    "unfolded": half(lambda y: F.unfold(y, 2).unflatten(1, (4, 4))[:, :, 0].reshape(-1, 4, 5, 5),
                     lambda y: F.unfold(y, 2).unflatten(1, (4, 4))[:, :, 3].reshape(-1, 4, 5, 5)),
    "parts of two versions": after(versions),
    "activations": after(lambda y: torch.cat([y.sigmoid()[:, :4], y.tanh()[:, 4:]], 1)),
    "stacked": after(lambda y: torch.stack([y[:, :4].roll(1, 3), y[:, 4:]], 1).flatten(1, 2)),
    "overwritten": after(overwritten),
    "flattened first": after(lambda y: torch.cat([(z := y.flatten(2))[:, :4].flip(2), z[:, 4:]], 1).view_as(y)),
}  # fmt: skip


def learned_map(m: Net, x: Tensor) -> Tensor:
    y = F.softplus(m.a(x))
    return m.out(torch.cat([y, m.map.weight.view(1, 2, 6, 6).expand(x.shape[0], -1, -1, -1)], 1).flatten(1))


FLATTENED = {
    "width": (lambda m, x: m.out(m.w(F.softplus(m.a(x))).flatten(1)), {"w": L(6, 5), "out": L(8 * 6 * 5, 3)}),
    "height": (lambda m, x: m.out(m.w(F.softplus(m.a(x)).mT).flatten(1)), {"w": L(6, 5), "out": L(8 * 6 * 5, 3)}),
    "both": (lambda m, x: m.out(m.v(m.w(F.softplus(m.a(x))).mT).flatten(1)),
             {"w": L(6, 5), "v": L(6, 4), "out": L(8 * 4 * 5, 3)}),
    "channels last": (lambda m, x: m.out(m.w(F.softplus(m.a(x))).movedim(1, -1).flatten(1)),
                      {"w": L(6, 5), "out": L(8 * 6 * 5, 3)}),
    "pixels": (lambda m, x: m.out(m.w(F.softplus(m.a(x)).flatten(2)).flatten(1)), {"w": L(36, 5), "out": L(40, 3)}),
    "pixels moved": (lambda m, x: m.out(m.w(F.softplus(m.a(x)).flatten(2)).roll(1, 2).flatten(1)),
                     {"w": L(36, 5), "out": L(40, 3)}),
    "a learned map beside": (learned_map, {"map": L(36, 2, bias=False), "out": L(10 * 36, 3)}),
    "a learned map alone": (lambda m, x: m.out((F.softplus(m.a(x)) * m.map.weight).flatten(1)),
                            {"map": L(6, 6, bias=False), "out": L(8 * 36, 3)}),
    "distances": (lambda m, x: m.out(torch.cdist(F.softplus(m.a(x)).flatten(2).mT, m.map.weight[None]).flatten(1)),
                  {"map": L(8, 5, bias=False), "out": L(36 * 5, 3)}),
    "distances of all": (lambda m, x: (lambda y: m.out(torch.cdist(y, y).flatten(1)))(m.w(m.a(x).flatten(2)).mT),
                         {"w": L(36, 5), "out": L(25, 3)}),
    "outer": (lambda m, x: (lambda y: m.out(torch.einsum("bi,bj->bij", m.u(y), m.v(y)).flatten(1)))(x.flatten(1)),
              {"u": L(108, 4), "v": L(108, 5), "out": L(20, 3)}),
}  # fmt: skip


def zeros(y: Tensor) -> Tensor:
    return torch.zeros_like(y)


PADDED = {
    "pad first": lambda m, v, d: F.pad(v, (0, 0, 0, 0, 2, 2)) + d,
    "pad last": lambda m, v, d: d + F.pad(v, (0, 0, 0, 0, 2, 2)),
    "zeros behind": lambda m, v, d: torch.cat([v, zeros(v)], 1) + d,
    "zeros before": lambda m, v, d: torch.cat([zeros(v), v], 1) + d,
    "ones behind": lambda m, v, d: torch.cat([v, torch.ones_like(v)], 1) * d,
    "gate": lambda m, v, d: F.pad(v, (0, 0, 0, 0, 0, 4)).sigmoid() * d,
    "norm": lambda m, v, d: m.n(F.pad(v, (0, 0, 0, 0, 4, 0))) + d,
    "norm alone": lambda m, v, d: m.n(F.pad(v, (0, 0, 0, 0, 4, 0))),
    "group norm": lambda m, v, d: m.g(F.pad(v, (0, 0, 0, 0, 4, 0))) + d,
    "maximum": lambda m, v, d: torch.maximum(F.pad(v, (0, 0, 0, 0, 2, 2)), d),
    "where": lambda m, v, d: torch.where(d > 0, F.pad(v, (0, 0, 0, 0, 2, 2)), d),
    "both padded": lambda m, v, d: F.pad(v, (0, 0, 0, 0, 0, 4)) + F.pad(d[:, :4], (0, 0, 0, 0, 4, 0)),
    "pooled": lambda m, v, d: F.pad(v, (0, 0, 0, 0, 2, 2)).mean((2, 3), keepdim=True) + d,
    "pooled other": lambda m, v, d: F.pad(v, (0, 0, 0, 0, 2, 2)) + d.mean((2, 3), keepdim=True),
    "two constants": lambda m, v, d: F.pad(F.pad(v, (0, 0, 0, 0, 1, 1), value=1.0), (0, 0, 0, 0, 1, 1), value=2.0),
    "zeros and ones": lambda m, v, d: torch.cat([v, zeros(v)[:, :2], torch.ones_like(v)[:, :2]], 1),
}  # fmt: skip


def padded(join: Callable[[Net, Tensor, Tensor], Tensor]) -> Net:
    def body(m: Net, x: Tensor) -> Tensor:
        v = m.c(x)
        return m.t(F.softplus(join(m, v, m.d(v)))).mean((2, 3))

    return Net(body, c=C(3, 4, 1), d=C(4, 8, 3, padding=1), n=nn.BatchNorm2d(8), g=nn.GroupNorm(2, 8), t=C(8, 3, 1))


def grouped(change: Callable[[Tensor], Tensor], *layers: nn.Module, width: int = 8) -> Net:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.t(m.g(change(m.c(x))).relu()).mean((2, 3))

    return Net(body, c=C(3, width, 1), g=nn.Sequential(*layers), t=C(8, 3, 1))


def twice(y: Tensor) -> Tensor:
    return torch.cat([y, y], 1)


GROUPED = {
    "cat": grouped(twice, C(16, 8, 1, groups=2)),
    "cat in four": grouped(twice, C(16, 8, 1, groups=4)),
    "cat across": grouped(twice, C(12, 8, 1, groups=4), width=6),
    "cat unevenly": grouped(twice, C(12, 9, 1, groups=3), C(9, 8, 1), width=6),
    "part of it": grouped(lambda y: torch.cat([y, y[:, :4]], 1), C(12, 8, 1, groups=2)),
    "repeat": grouped(lambda y: y.repeat(1, 2, 1, 1), C(16, 8, 1, groups=2)),
    "tile": grouped(lambda y: y.tile(1, 2, 1, 1), C(16, 8, 3, groups=4)),
    "interleaved": grouped(lambda y: y.repeat_interleave(2, 1), C(16, 8, 1, groups=4)),
    "crelu": grouped(lambda y: torch.cat([y, -y], 1).relu(), C(16, 8, 1, groups=2)),
    "crelu without groups": grouped(lambda y: torch.cat([y, -y], 1).relu(), C(16, 8, 1)),
    "crelu turned": grouped(lambda y: torch.cat([y.relu(), (-y).relu().flip(1)], 1), C(16, 8, 1)),
    "crelu shuffled": grouped(lambda y: F.channel_shuffle(torch.cat([y, (-y).relu().flip(1)], 1), 2), C(16, 8, 1)),
    "differences": grouped(lambda y: torch.cat([y, y[:, 1:] - y[:, :-1], y[:, :1]], 1), C(16, 8, 1, groups=2)),
    "depthwise": grouped(twice, C(16, 16, 3, groups=16), C(16, 8, 1)),
    "group norm": grouped(twice, nn.GroupNorm(4, 16), C(16, 8, 1)),
    "group norm across": grouped(twice, nn.GroupNorm(4, 12), C(12, 8, 1), width=6),
    "rolled": grouped(lambda y: y.roll(1, 1), C(6, 8, 1, groups=2), width=6),
    "rolled twice": grouped(lambda y: y.roll(1, 1), C(8, 8, 1, groups=4), C(8, 8, 1, groups=2)),
    "two and three": grouped(lambda y: y, C(6, 6, 1, groups=2), C(6, 6, 1, groups=3), C(6, 8, 1), width=6),
    "three and two": grouped(lambda y: y, C(6, 6, 1, groups=3), C(6, 6, 1, groups=2), C(6, 8, 1), width=6),
    "transposed": grouped(lambda y: y, T(6, 6, 2, groups=2), C(6, 6, 1, groups=3), C(6, 8, 1), width=6),
    "transposed twice": grouped(twice, T(12, 6, 2, groups=2), C(6, 8, 1), width=6),
    "transposed four": grouped(twice, T(16, 8, 2, groups=4)),
    "shuffled": grouped(lambda y: F.channel_shuffle(y, 4), C(8, 8, 1, groups=2), C(8, 8, 1, groups=4)),
}  # fmt: skip

ORDER = {
    "shuffled": lambda v: v + F.channel_shuffle(v, 2),
    "shuffled twice": lambda v: v + F.channel_shuffle(F.channel_shuffle(v, 2), 4),
    "rolled": lambda v: v + v.roll(1, 1),
    "rolled by two": lambda v: v * v.roll(2, 1).sigmoid(),
    "rolled by three": lambda v: v + v.roll(3, 1).relu(),
    "turned": lambda v: v + v.flip(1).tanh(),
    "halves": lambda v: v + torch.cat([v[:, 4:], v[:, :4]], 1).tanh(),
    "swapped pairs": lambda v: v + v.unflatten(1, (4, 2)).flip(2).flatten(1, 2).tanh(),
    "uneven pairs": lambda v: v + v[:, [1, 0, 2, 3, 5, 4, 7, 6]].tanh(),
    "two cycles": lambda v: v + v[:, [1, 2, 3, 0, 7, 4, 5, 6]].tanh(),
    "cycles crossed": lambda v: v + v[:, [1, 2, 3, 0, 7, 4, 5, 6]].tanh() + v[:, [3, 0, 1, 2, 5, 6, 7, 4]].sigmoid(),
    "parts marked": lambda v: torch.cat([v[:, :2].relu(), v[:, 2:]], 1) + v[:, [4, 5, 6, 7, 1, 0, 3, 2]].tanh(),
}
SHUFFLED = {
    "1x1": (lambda m, x: m.head(F.softplus(m.b(F.pixel_shuffle(F.softplus(m.a(x)), 2))).mean((2, 3))), C(2, 6, 1)),
    "3x3": (lambda m, x: m.head(F.softplus(m.b(F.pixel_shuffle(F.softplus(m.a(x)), 2))).mean((2, 3))), C(2, 6, 3)),
    "unshuffled": (lambda m, x: m.head(F.softplus(m.b(F.pixel_unshuffle(m.a(x), 2))).mean((2, 3))), C(32, 6, 1)),
    "linear": (lambda m, x: m.head(m.b(F.pixel_shuffle(m.a(x), 2).movedim(1, -1)).mean((1, 2))), L(2, 6)),
}


def cross(m: Net, z: Tensor, x: Tensor) -> Tensor:
    k, v = m.kv(m.e(x.flatten(2).mT)).chunk(2, -1)
    return m.out((z + (m.q(z) @ k.mT).softmax(-1) @ v).mean(1))


QUERIES = {
    "expanded": lambda m, x: cross(m, m.p.weight.expand(x.shape[0], -1, -1), x),
    "repeated": lambda m, x: cross(m, m.p.weight[None].repeat(x.shape[0], 1, 1), x),
    "a layer on them": lambda m, x: cross(m, m.r(m.p.weight).expand(x.shape[0], -1, -1), x),
    "two layers": lambda m, x: cross(m, m.r(m.r(m.p.weight).relu())[None], x),
    "a norm of them": lambda m, x: cross(m, F.layer_norm(m.p.weight, (8,))[None], x),
    "added": lambda m, x: m.out((m.e(x.flatten(2).mT)[:, :4] + m.r(m.p.weight)).relu().mean(1)),
    "pooled": lambda m, x: m.out((m.e(x.flatten(2).mT).relu() @ m.r(m.p.weight).mT).softmax(1).mean(2) @ m.s.weight),
    "a constant": lambda m, x: m.out((m.e(x.flatten(2).mT) + m.r(torch.linspace(0, 1, 8).double())).relu().mean(1)),
}


def permuted(net: nn.Module, shape: tuple[int, ...] = SHAPE) -> tuple[float, fxzip.ChannelSpec]:
    """How far permuted copies are from a network, as a share of its largest value; and its channel spaces."""
    g = Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=g)
                tensor.copy_(drawn + 0.1 if tensor.dim() == 1 else drawn * 2 - 1)
    net = net.double().eval()
    x = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    spec = fxzip.analyse(net, x)
    with torch.no_grad():
        wanted = net(x)
        copies = [spec.permute(net, Generator().manual_seed(seed))(x) for seed in range(4)]
    return max(float((wanted - found).abs().max() / wanted.abs().max()) for found in copies), spec


def nets() -> dict[str, Net]:
    """All networks by name."""
    found = {f"positions: {name}": Net(body, **two()) for name, body in POSITIONS.items()}
    found |= {f"flattened: {name}": Net(body, a=C(3, 8, 1), **layers) for name, (body, layers) in FLATTENED.items()}
    found |= {f"padded: {name}": padded(join) for name, join in PADDED.items()}
    found |= {f"grouped: {name}": net for name, net in GROUPED.items()}
    for name, change in ORDER.items():
        body = lambda m, x, change=change: m.t(change(m.c(x))).mean((2, 3))  # noqa: E731
        found[f"order: {name}"] = Net(body, c=C(3, 8, 3, padding=1), t=C(8, 2, 1))
    for name, (body, last) in SHUFFLED.items():
        found[f"shuffled: {name}"] = Net(body, a=C(3, 8, 3, padding=1), b=last, head=L(6, 3))
    for name, body in QUERIES.items():
        layers = {"e": L(3, 8), "q": L(8, 8), "kv": L(8, 16), "r": L(8, 8), "out": L(8, 3)}
        found[f"queries: {name}"] = Net(body, p=L(8, 4, bias=False), s=L(8, 36, bias=False), **layers)
    return found


NETS = nets()
FREE: dict[str, tuple[float, int]] = {
    "positions: roll": (0.99, 11),
    "positions: roll over both axes": (0.99, 11),
    "positions: flip": (0.99, 11),
    "positions: transpose": (0.99, 11),
    "positions: rot90": (0.99, 11),
    "positions: crop and pad": (0.99, 11),
    "positions: pad and crop by a constant": (0.99, 11),
    "positions: reflect": (0.99, 11),
    "positions: strided": (0.99, 11),
    "positions: index_select": (0.99, 11),
    "positions: advanced index": (0.99, 11),
    "positions: a pixel expanded": (0.99, 11),
    "positions: halves of an image swapped": (0.99, 11),
    "positions: unfolded": (0.99, 11),
    "positions: parts of two versions": (0.99, 11),
    "positions: activations": (0.99, 11),
    "positions: stacked": (0.99, 11),
    "positions: overwritten": (0.99, 11),
    "positions: flattened first": (0.99, 11),
    "flattened: width": (0.952, 7),
    "flattened: height": (0.952, 7),
    "flattened: both": (0.886, 7),
    "flattened: channels last": (0.952, 7),
    "flattened: pixels": (0.447, 7),
    "flattened: pixels moved": (0.447, 7),
    "flattened: a learned map beside": (0.243, 35),
    "flattened: a learned map alone": (0.958, 7),
    "flattened: distances": (0.995, 11),
    "flattened: distances of all": (0.108, 7),
    "flattened: outer": (0.58, 4),
    "padded: pad first": (0.991, 6),
    "padded: pad last": (0.991, 6),
    "padded: zeros behind": (0.991, 6),
    "padded: zeros before": (0.991, 6),
    "padded: ones behind": (0.991, 6),
    "padded: gate": (0.991, 6),
    "padded: norm": (0.992, 6),
    "padded: norm alone": (0.949, 6),
    "padded: group norm": (0.992, 6),
    "padded: maximum": (0.991, 6),
    "padded: where": (0.991, 6),
    "padded: both padded": (0.991, 9),
    "padded: pooled": (0.991, 6),
    "padded: pooled other": (0.991, 6),
    "padded: two constants": (0.651, 3),
    "padded: zeros and ones": (0.651, 3),
    "grouped: cat": (0.977, 13),
    "grouped: cat in four": (0.97, 10),
    "grouped: cat across": (0.964, 8),
    "grouped: cat unevenly": (0.983, 16),
    "grouped: part of it": (0.974, 11),
    "grouped: repeat": (0.977, 13),
    "grouped: tile": (0.992, 10),
    "grouped: interleaved": (0.97, 17),
    "grouped: crelu": (0.977, 13),
    "grouped: crelu without groups": (0.985, 14),
    "grouped: crelu turned": (0.985, 14),
    "grouped: crelu shuffled": (0.985, 13),
    "grouped: differences": (0.733, 6),
    "grouped: depthwise": (0.992, 14),
    "grouped: group norm": (0.987, 13),
    "grouped: group norm across": (0.983, 11),
    "grouped: rolled": (0.964, 13),
    "grouped: rolled twice": (0.976, 20),
    "grouped: two and three": (0.966, 16),
    "grouped: three and two": (0.966, 16),
    "grouped: transposed": (0.975, 16),
    "grouped: transposed twice": (0.988, 16),
    "grouped: transposed four": (0.985, 10),
    "grouped: shuffled": (0.976, 20),
    "order: shuffled": (0.992, 2),
    "order: shuffled twice": (0.992, 7),
    "order: rolled": (0.992, 0),
    "order: rolled by two": (0.992, 1),
    "order: rolled by three": (0.992, 0),
    "order: turned": (0.992, 3),
    "order: halves": (0.992, 3),
    "order: swapped pairs": (0.992, 3),
    "order: uneven pairs": (0.992, 3),
    "order: two cycles": (0.992, 1),
    "order: cycles crossed": (0.992, 1),
    "order: parts marked": (0.992, 0),
    "shuffled: 1x1": (0.989, 8),
    "shuffled: 3x3": (0.992, 6),
    "shuffled: unshuffled": (0.993, 12),
    "shuffled: linear": (0.989, 8),
    "queries: expanded": (0.99, 24),
    "queries: repeated": (0.99, 24),
    "queries: a layer on them": (0.99, 24),
    "queries: two layers": (0.989, 24),
    "queries: a norm of them": (0.989, 24),
    "queries: added": (0.967, 7),
    "queries: pooled": (0.992, 17),
    "queries: a constant": (0.977, 7),
}
"""For each network its coverage, and how many channels there are beside one in each space."""


@pytest.mark.parametrize("name", NETS)
def test_a_permuted_copy_computes_the_same(name: str) -> None:
    error, spec = permuted(NETS[name])
    assert error < 1e-9
    assert (round(spec.coverage, 3), sum(space.size - 1 for space in spec.spaces)) == FREE[name]


def test_a_rule_of_fxzip_that_fails_is_an_error_and_one_of_a_user_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: RuleContext, module: nn.Module, x: Labelled) -> Labelled:
        raise ZeroDivisionError("no")

    net, x = Net(after(F.relu), **two()), torch.rand(SHAPE)
    monkeypatch.setitem(registry._RULES, nn.Conv2d, replace(registry._RULES[nn.Conv2d], rule=broken))
    with pytest.warns(fxzip.errors.FrozenSpaceWarning, match="its rule failed: no"):
        fxzip.analyse(net, x)
    broken.__module__ = "fxzip.rules.contractions"
    with pytest.raises(RuleError, match=r"broken failed.*: no"):
        fxzip.analyse(net, x)
