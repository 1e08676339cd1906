"""The analysis on small networks, one for each kind of rule: oracles 1 and 2, and what must be found."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.labelling.labels import Labelled
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.trace import trace
from fxzip.rules import RuleContext, unregister_rule
from fxzip.rules.movement import reshaped
from tests.nets import Net
from tests.oracles import TOLERANCE, call, difference, mutations_missed, permutation_error, randomise


def conv(i: int, o: int, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def squeeze_excite(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    gate = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()
    return m.head((x * gate).flatten(1))


def attention(m: Net, x: Tensor) -> Tensor:
    b, n, c = (x := m.embed(x).flatten(2).transpose(1, 2)).shape
    q, k, v = m.qkv(m.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    x = x + m.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
    return m.head(x.mean(1))


def residual(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.norm(m.a(x)))
    x = F.relu(x + m.c(F.relu(m.b(x))))
    return m.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def dense(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x = torch.cat([x, m.b(F.relu(x))], 1)
    x = torch.cat([x, m.c(F.relu(m.norm(x)))], 1)
    return m.head(x.amax((2, 3)))


def shuffled(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    x = shuffle(torch.cat([left, m.b(right)], 1), 2)
    left, right = x.split(4, dim=1)
    return m.head(shuffle(torch.cat([left, m.c(right)], 1), 2).mean((2, 3)))


def scaled(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head((x * m.gamma.weight.view(1, -1, 1, 1)).mean((2, 3)))


def standardised(m: Net, x: Tensor) -> Tensor:
    w = m.b.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    return m.head(F.conv2d(F.relu(m.a(x)), w, m.b.bias, padding=1).mean((2, 3)))


def gained(m: Net, x: Tensor) -> Tensor:
    w = m.b.weight * m.gain.bias[:, None, None, None]
    return m.head(F.conv2d(F.relu(m.a(x)), w, m.b.bias, padding=1).mean((2, 3)))


def plain(m: Net, x: Tensor) -> Tensor:
    for name, layer in m.named_children():
        x = layer(x) if name != "head" else layer(x.mean((2, 3)))
    return x


def split_attention(m: Net, x: Tensor) -> Tensor:
    b, _, h, w = (x := F.relu(m.a(x))).shape
    x = x.view(b, 2, 6, h, w)
    gate = m.up(F.relu(m.down(x.sum(1).mean((2, 3))))).view(b, 2, 6).softmax(1)
    return m.head((x * gate[..., None, None]).sum(1).mean((2, 3)))


def filled(m: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.pad(m.a(x), (0, 1, 0, 1), value=float("-inf")), 3, 2)
    x = m.edge(m.b(x).relu())
    return m.head(F.pad(x, (1, 1), "constant", 9.0).mean((2, 3)))


def weighed(m: Net, x: Tensor) -> Tensor:
    scales = torch.stack([m.a(x).mean((2, 3)), m.b(x).mean((2, 3)), m.c(x).mean((2, 3))], 1)
    return m.head(m.weigh(scales).squeeze(1).relu())


LINEAR = nn.Linear
CASES = {
    "residual": Net(residual, a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 6), c=conv(6, 8), head=LINEAR(8, 3)),
    "dense": Net(dense, a=conv(3, 8), b=conv(8, 4), norm=nn.BatchNorm2d(12), c=conv(12, 4), head=LINEAR(16, 3)),
    "shuffle": Net(shuffled, a=conv(3, 8), b=conv(4, 4), c=conv(4, 4), head=LINEAR(8, 3)),
    "squeeze and excite": Net(
        squeeze_excite, a=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), head=LINEAR(8 * 64, 3)
    ),
    "grouped": Net(plain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 12, groups=4), act2=nn.ReLU(), head=LINEAR(12, 3)),
    "depthwise": Net(plain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 8, groups=8), head=LINEAR(8, 3)),
    "depthwise with multiplier": Net(plain, a=conv(3, 6), b=conv(6, 12, groups=6), act=nn.ReLU(), head=LINEAR(12, 3)),
    "groups of one output": Net(plain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 4, groups=4), head=LINEAR(4, 3)),
    "nested groups": Net(plain, a=conv(3, 16), b=conv(16, 16, groups=4), c=conv(16, 16, groups=2), head=LINEAR(16, 3)),
    "group norm": Net(plain, a=conv(3, 8), norm=nn.GroupNorm(4, 8), act=nn.GELU(), b=conv(8, 4), head=LINEAR(4, 3)),
    "group norm across groups": Net(
        plain, a=conv(3, 16), norm=nn.GroupNorm(8, 16), b=conv(16, 16, groups=2), act=nn.ReLU(), head=LINEAR(16, 3)
    ),
    "transposed": Net(
        plain, a=conv(3, 8), up=nn.ConvTranspose2d(8, 6, 2, 2), act=nn.ReLU(), b=conv(6, 4), head=LINEAR(4, 3)
    ),
    "transposed, grouped": Net(
        plain, a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, 2, groups=4), act=nn.ReLU(), head=LINEAR(12, 3)
    ),
    "transposed, depthwise": Net(
        plain, a=conv(3, 8), up=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), act=nn.ReLU(), head=LINEAR(8, 3)
    ),
    "transposed, depthwise with multiplier": Net(
        plain, a=conv(3, 6), up=nn.ConvTranspose2d(6, 12, 2, 2, groups=6), act=nn.ReLU(), head=LINEAR(12, 3)
    ),
    "glu": Net(plain, a=conv(3, 8), glu=nn.GLU(1), head=LINEAR(4, 3)),
    "prelu": Net(plain, a=conv(3, 8), act=nn.PReLU(8), one=nn.PReLU(), head=LINEAR(8, 3)),
    "pixel shuffle": Net(
        plain, a=conv(3, 16), up=nn.PixelShuffle(2), b=conv(4, 8), down=nn.PixelUnshuffle(2), head=LINEAR(32, 3)
    ),
    "scale": Net(scaled, a=conv(3, 8), gamma=nn.BatchNorm2d(8), head=LINEAR(8, 3)),
    "weight standardised": Net(standardised, a=conv(3, 8), b=conv(8, 6), head=LINEAR(6, 3)),
    "weight with a gain": Net(gained, a=conv(3, 8), b=conv(8, 6), gain=nn.LayerNorm(6), head=LINEAR(6, 3)),
    "filled up": Net(filled, a=conv(3, 8), b=conv(8, 6), edge=nn.ConstantPad2d(1, 4.0), head=LINEAR(6, 3)),
    "scales that are weighed": Net(
        weighed, a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), weigh=nn.Conv1d(3, 1, 1), head=LINEAR(8, 3)
    ),
    "split attention": Net(split_attention, a=conv(3, 12), down=LINEAR(6, 4), up=LINEAR(4, 12), head=LINEAR(6, 3)),
    "attention": Net(
        attention,
        embed=nn.Conv2d(3, 8, 4, 4),
        norm=nn.LayerNorm(8),
        qkv=LINEAR(8, 24),
        proj=LINEAR(8, 8),
        head=LINEAR(8, 3),
    ),
    "pads and pools": Net(
        plain,
        pad=nn.ZeroPad2d(2),
        a=nn.Conv2d(3, 8, 3),
        lrelu=nn.LeakyReLU(),
        pool=nn.MaxPool2d(3, 2),
        up=nn.Upsample(scale_factor=2),
        edge=nn.ReflectionPad2d(1),
        b=conv(8, 5),
        head=LINEAR(5, 3),
    ),
}


def example() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_of_all_spaces_is_no_change_and_each_site_matters(name: str) -> None:
    x = example()
    model = randomise(CASES[name], x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.FrozenSpaceWarning)
        spec = fxzip.analyse(model, x)
    assert spec.coverage > 0.9, str(spec)
    assert not spec.frozen
    moved = spec.permute(model)
    assert difference(call(model, x), call(moved, x)) < TOLERANCE
    assert mutations_missed(moved if spec.folded else model, x, spec, most=100) == []


def sizes(name: str) -> dict[str, int]:
    spec = fxzip.analyse(randomise(CASES[name], example()), example())
    return {space.name: space.size for space in spec.spaces}


def test_what_is_filled_up_with_a_constant_ties_no_channels() -> None:
    spec = fxzip.analyse(randomise(CASES["filled up"], example()), example())
    assert {space.name: space.size for space in spec.spaces} == {"a": 8, "b": 6}
    for node in spec.layout.factors:
        spec.locate(node)


def test_what_a_residual_add_ties_is_one_space() -> None:
    assert sizes("residual") == {"a": 8, "b": 6}


def test_concatenation_keeps_spaces_apart() -> None:
    assert sizes("dense") == {"a": 8, "b": 4, "c": 4}


def test_a_depthwise_convolution_ties_its_output_to_its_input() -> None:
    assert sizes("depthwise") == {"a": 8}
    assert sizes("squeeze and excite") == {"a": 8, "down": 2}


def test_groups_of_a_convolution_are_blocks_that_move() -> None:
    spec = fxzip.analyse(randomise(CASES["grouped"], example()), example())
    assert spec["a"].parent == spec["b"].parent is not None
    blocks = spec[str(spec["a"].parent)]
    assert (blocks.size, spec["a"].size, spec["b"].size) == (4, 8, 12)
    assert spec["a"].block is not None
    assert spec["a"].block.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_attention_heads_are_blocks_of_queries_keys_and_values() -> None:
    spec = fxzip.analyse(randomise(CASES["attention"], example()), example())
    assert spec["embed"].size == 8
    inside = [space for space in spec.spaces if space.parent]
    assert [space.size for space in inside] == [8, 8]  # queries with keys, and values
    assert {spec[str(space.parent)].size for space in inside} == {4}


def test_outputs_and_inputs_stay_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)).double()
    spec = fxzip.analyse(model, example())
    assert [space.size for space in spec.spaces] == [8]
    assert [(s.parameter, s.axis) for s in spec.spaces[0].sites] == [
        ("0.weight", 0),
        ("0.bias", 0),
        ("1.weight", 1),
    ]


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x).cumsum(1)))).mean((2, 3))


def test_an_operation_without_a_rule_freezes_what_it_touches_and_says_which() -> None:
    x = example()
    model = randomise(Sorted(), x)
    with pytest.warns(fxzip.FrozenSpaceWarning, match="cumsum"):
        spec = fxzip.analyse(model, x)
    assert [space.name for space in spec.spaces] == ["b"]
    assert [(f.name, f.size) for f in spec.frozen] == [("a", 8)]
    assert "cumsum" in spec.frozen[0].reason
    assert permutation_error(model, x, spec) < TOLERANCE


class Channelwise(nn.Module):
    """ECA: a convolution over the channels, so that their order matters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.eca, self.head = conv(3, 8), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.eca(x.mean((2, 3))[:, None, :]).sigmoid()
        return self.head((x * gate.transpose(1, 2)[..., None]).mean((2, 3)))


def test_a_convolution_over_channels_freezes_them() -> None:
    x = example()
    model = randomise(Channelwise(), x)
    spec = fxzip.analyse(model, x)
    assert [f.name for f in spec.frozen] == ["a"]
    assert permutation_error(model, x, spec) < TOLERANCE


class Scale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(n))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape  # channels in two axes, which probing does not look into
        x = x.view(b, 2, c // 2, h, w).cumprod(3).view(b, c, h, w)
        return x * self.scale[:, None, None]


def test_a_user_can_add_a_rule_once() -> None:
    def cumprod(ctx: RuleContext, input: object, dim: int) -> object:
        return ctx.elementwise(input)

    x = example()
    model = randomise(nn.Sequential(conv(3, 8), Scale(8), conv(8, 3)), x)
    with pytest.warns(fxzip.FrozenSpaceWarning, match="cumprod"):
        assert not fxzip.analyse(model, x).spaces
    fxzip.register_rule(torch.Tensor.cumprod)(cumprod)
    try:
        spec = fxzip.analyse(model, x)
        assert [space.size for space in spec.spaces] == [8]
        assert permutation_error(model, x, spec) < TOLERANCE
        with pytest.raises(fxzip.OptionError, match="registered already"):
            fxzip.register_rule("cumprod")(cumprod)
    finally:
        unregister_rule("cumprod")


def test_the_spec_prints_as_a_table() -> None:
    text = str(fxzip.analyse(randomise(CASES["residual"], example()), example()))
    assert "2 channel spaces" in text
    assert "a " in text
    assert "8" in text


class Table(nn.Module):
    """Rows of a table of relative positions, by distances that are computed on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.table = nn.Parameter(torch.randn(7, 8))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, 6) to (n, 4, 5)."""
        places = torch.arange(4, device=x.device)
        distances = (places[:, None] - places[None, :] + 3).long()
        return self.last(self.first(x) + self.table[distances].sum(1))


def test_constants_have_values_where_the_weights_have_none() -> None:
    x = torch.randn(2, 4, 6)
    real, meta = fxzip.analyse(Table(), x), fxzip.analyse(Table().to("meta"), x)
    assert [(space.size, len(space.sites)) for space in real.spaces] == [(8, 4)]
    assert [repr(space.sites) for space in meta.spaces] == [repr(space.sites) for space in real.spaces]
    assert meta.coverage == real.coverage


class Tokens(nn.Module):
    """Pixels as tokens, a class token and two registers before them, through two residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = conv(3, 6), nn.LayerNorm(6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.first, self.registers = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 2, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, from the class token."""
        x = torch.flatten(input=self.embed(x), start_dim=2).transpose(1, 2)
        before = [token.expand(x.shape[0], -1, -1) for token in (self.first, self.registers)]
        x = torch.cat([*before, x], 1)
        for layer in self.layers:
            x = x + layer(self.norm(x).softmax(1))
        return self.head(x[:, 0])


def test_tokens_that_meet_a_layer_share_its_channels() -> None:
    model, x = randomise(Tokens(), example()), example()
    graph = canonicalise(trace(model, (x[:2],)))
    spec = analyse_graph(graph, (x[:2],), {})
    assert [space.size for space in spec.spaces if space.size > 2] == [6]
    assert permutation_error(model, x, spec) < TOLERANCE
    sums = [node.name for node in graph.graph.nodes if node.target is operator.add]
    assert len(sums) == 2
    for name in sums:  # labels for each channel, and for each token, but not for each of both
        assert {factor.numel() for factor in spec.layout.factors[name]} <= {6, 3 + x.shape[2] * x.shape[3]}


@pytest.mark.parametrize(
    ("old", "new", "sizes"),
    [
        ((4, 10**6, 10**6), (4, 10**3, 10**3, 10**6), (4, 1, 1, 1)),
        ((10**6, 4, 10**3, 10**3), (10**6, 4, 10**6), (1, 4, 1)),
        ((10**6, 1, 4), (1, 10**6, 2, 2, 1), (1, 1, 2, 2, 1)),
        ((10**6, 10**6, 4, 3), (10**6, 10**6, 12), (1, 1, 12)),
    ],
)
def test_only_axes_with_labels_are_spread_out(old: tuple[int, ...], new: tuple[int, ...], sizes: list[int]) -> None:
    axis = old.index(4)
    labels = torch.arange(2, 6).reshape([-1 if a == axis else 1 for a in range(len(old))])
    (factor,) = reshaped(Labelled(old, (labels,)), *new).factors
    assert factor.shape == torch.Size(sizes)
    assert factor.flatten().tolist() == labels.flatten().repeat_interleave(factor.numel() // 4).tolist()
