"""Linear spaces: which they are, and that turning them is exact (the rotation oracle)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.linearise import linearise
from fxzip.passes.rotate import random_rotations, rotate
from fxzip.passes.trace import trace
from fxzip.testing import rotation_error
from tests.nets import Net, chain, conv, untouched
from tests.oracles import call, difference, randomise
from tests.zoo.test_language import GPT, TOKENS, WORDS, Encoder

EXACT = 1e-10
WIDTH, HEADS, GROUPS, DIM = 16, 4, 2, 4


def pixels(size: int = 8, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def known(model: nn.Module, x: Any) -> dict[str, str | None]:
    """For each space with more than one channel why it is not linear."""
    return {space.name: space.bent for space in fxzip.analyse(model, x).spaces}


def linear(model: nn.Module, x: Any) -> set[str]:
    return {name for name, bent in known(model, x).items() if bent is None}


# ---- the zoo: the oracle, and which spaces are linear


class LlamaBlock(nn.Module):
    """Grouped queries, rotary positions, RMSNorm, a gated MLP; no biases."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * DIM, bias=False) for n in (HEADS, GROUPS, GROUPS))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turned(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat([-b, a], -1) * sin

        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (turned(k), v))
        mixed = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class WrittenOut(nn.Module):
    """RMSNorm as Hugging Face's models have it: squares, their mean, and a product."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Llama(nn.Module):
    """A language model with tied embeddings."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(LlamaBlock(norm) for _ in range(2))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, angles.cos().to(x), angles.sin().to(x))
        return self.head(self.norm(x))


def of_timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **options)  # type: ignore[no-any-return]


VIT = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
VALUES = {f"blocks.{block}.v{part}" for block in (0, 1) for part in ("", "#2")}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "vit": (
        lambda: of_timm("vit_tiny_patch16_224", **VIT),
        lambda: pixels(32),
        {"patch_embed.proj", "blocks.0.attn.qkv#2", "blocks.1.attn.qkv#2"},
    ),
    "deit": (  # layer scales, and a class token without a position
        lambda: of_timm("deit3_small_patch16_224", **VIT),
        lambda: pixels(32),
        {"patch_embed.proj", "blocks.0.attn.qkv#2", "blocks.1.attn.qkv#2"},
    ),
    "swin": (  # between stages four tokens become one, under one norm: only the last stage's stream is linear
        lambda: of_timm("swin_tiny_patch4_window7_224", **SWIN),
        lambda: pixels(32),
        {
            "layers.1.downsample.reduction",
            *(f"layers.{stage}.blocks.{block}.attn.qkv#2" for stage in (0, 1) for block in (0, 1)),
        },
    ),
    "convnext": (  # depthwise convolutions read the streams: nothing is linear
        lambda: of_timm("test_convnext"),
        lambda: pixels(32),
        set(),
    ),
    "mobilenetv2": (  # the bottlenecks, and nothing between them
        lambda: of_timm("mobilenetv2_035"),
        lambda: pixels(32),
        {"blocks.0.0.conv_pw", *(f"blocks.{stage}.0.conv_pwl" for stage in range(1, 7))},
    ),
    "efficientnet_lite": (
        lambda: of_timm("tf_efficientnet_lite0"),
        lambda: pixels(32),
        {"blocks.0.0.conv_pw", *(f"blocks.{stage}.0.conv_pwl" for stage in range(1, 7))},
    ),
    "gpt": (lambda: GPT(tied=True), lambda: TOKENS, {"wte", "blocks.0.qkv#2", "blocks.1.qkv#2"}),
    "gpt, written out": (lambda: GPT(fused=False), lambda: TOKENS, {"wte", "blocks.0.qkv#2", "blocks.1.qkv#2"}),
    "bert": (  # norms behind the sums: the stream is scaled where it goes on
        Encoder,
        lambda: TOKENS,
        {f"encoder.layers.{block}.self_attn.in_proj_weight#2" for block in (0, 1)},
    ),
    "llama": (Llama, lambda: TOKENS, {"embed", *VALUES}),
    "llama, norms written out": (lambda: Llama(WrittenOut), lambda: TOKENS, {"embed", *VALUES}),
}


@pytest.mark.parametrize("name", CASES)
def test_linear_spaces_may_be_turned(name: str) -> None:
    make, example, expected = CASES[name]
    torch.manual_seed(0)
    x = example()
    model = randomise(make(), x)
    with warnings.catch_warnings(), untouched(model):
        warnings.simplefilter("ignore")
        assert linear(model, x) == expected
        errors = rotation_error(model, x)
    assert set(errors) == {"", *expected}
    assert max(errors.values()) < EXACT, errors


# ---- what bends a space


def stream(m: Net, x: Tensor) -> Tensor:
    return m.embed(x).flatten(2).transpose(1, 2)


def read_otherwise(m: Net, x: Tensor) -> Tensor:
    y = stream(m, x)
    return m.head((m.one(m.norm(y)) + m.two(y)).relu().mean(1))


def moved_by_one(m: Net, x: Tensor) -> Tensor:
    return m.head(stream(m, x) + 1)


def gated(m: Net, x: Tensor) -> Tensor:
    return m.head(m.norm(stream(m, x)) * torch.sigmoid(stream(m, x).mean(-1, keepdim=True)))


def scaled_for_a_sum(m: Net, x: Tensor) -> Tensor:
    y = stream(m, x)
    return m.head(y + m.norm(y))


def padded_behind_a_shift(m: Net, x: Tensor) -> Tensor:
    return m.last(m.norm(stream(m, x)).transpose(1, 2).unflatten(2, (8, 8)))


def scaled_by_place(m: Net, x: Tensor) -> Tensor:
    return m.last(m.embed(x) * m.table.weight.unflatten(1, (8, 1)))


def beside_zeros(m: Net, x: Tensor) -> Tensor:
    y = m.embed(x).mean((2, 3))
    return m.head(m.wide(torch.cat([y, torch.zeros_like(y)], 1) + 1))


def norm_of_two(m: Net, x: Tensor) -> Tensor:
    y = stream(m, x)
    return m.head(m.norm(torch.cat([y, y.flip(1)], -1)))


def parts() -> dict[str, nn.Module]:
    return {
        "embed": conv(3, 6, 1),
        "norm": nn.LayerNorm(6),
        "one": nn.Linear(6, 7),
        "two": nn.Linear(6, 7),
        "head": nn.Linear(6, 3),
    }


BENT: dict[str, tuple[Callable[[Net, Tensor], Any], dict[str, nn.Module], str]] = {
    "another reader": (read_otherwise, {"head": nn.Linear(7, 3)}, "norm subtracts the mean, and two reads"),
    "a constant": (moved_by_one, {}, "add is not linear in it"),
    "a mean over channels": (gated, {}, "mean is not linear in it"),
    "a sum behind a scale": (scaled_for_a_sum, {}, "add is not linear in it"),
    "padding behind a shift": (padded_behind_a_shift, {"last": conv(6, 3)}, "last cannot take the scale"),
    "a scale of each row": (scaled_by_place, {"table": nn.Embedding(6, 8), "last": conv(6, 3, 1)}, "mul is not linear"),
    "a mean of two copies": (norm_of_two, {"norm": nn.LayerNorm(12), "head": nn.Linear(12, 3)}, "norm normalises more"),
}


@pytest.mark.parametrize("name", BENT)
def test_a_space_says_what_bends_it(name: str) -> None:
    body, others, why = BENT[name]
    x = pixels()
    model = randomise(Net(body, **{**parts(), **others}), x)
    bent = known(model, x)["embed"]
    assert bent is not None
    assert bent.startswith(why), bent
    assert rotation_error(model, x)[""] < EXACT


def test_what_is_read_and_never_written_is_not_linear() -> None:
    x = pixels()
    model = randomise(Net(beside_zeros, **{**parts(), "wide": nn.Linear(12, 5), "head": nn.Linear(5, 3)}), x)
    bent = known(model, x)
    assert bent["wide"] == "wide reads constants in its place"
    assert rotation_error(model, x)[""] < EXACT


def test_a_constant_keeps_all_its_digits() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.head(m.embed(x).mul(0.3).add(0.1).relu().mean((2, 3)))

    x = pixels()
    assert rotation_error(randomise(Net(body, **parts()), x), x)[""] < 1e-12


def test_an_rms_norm_of_two_copies_may_be_turned() -> None:
    x = pixels()
    model = randomise(Net(norm_of_two, **{**parts(), "norm": nn.RMSNorm(12), "head": nn.Linear(12, 3)}), x)
    assert linear(model, x) == {"embed"}
    assert rotation_error(model, x)[""] < EXACT


def test_a_layer_that_is_called_twice_reads_two_norms() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = stream(m, x)
        return m.head((m.one(m.norm(y)) + m.one(m.other(y))).relu().mean(1))

    x = pixels()
    model = randomise(Net(body, **{**parts(), "other": nn.LayerNorm(6), "head": nn.Linear(7, 3)}), x)
    assert linear(model, x) == {"embed"}
    assert rotation_error(model, x)[""] < EXACT


def test_the_oracle_notices_a_space_that_is_not_linear() -> None:
    x = pixels()
    model = randomise(Net(chain, first=conv(3, 6), act=nn.ReLU(), second=conv(6, 3)), x)
    assert linear(model, x) == set()
    traced = canonicalise(trace(model, (x,), {}))
    module, spec = linearise(traced, analyse_graph(traced, (x,), {}))
    spec = replace(spec, spaces=tuple(replace(space, bent=None) for space in spec.spaces))
    turned = rotate(spec, module, random_rotations(spec, Generator().manual_seed(0)))
    assert difference(call(model, x), call(turned, x)) > 0.01


def test_a_linear_space_shows_it() -> None:
    x = pixels()
    model = randomise(Net(chain, first=conv(3, 6), second=conv(6, 8), act=nn.ReLU(), third=conv(8, 3)), x)
    spec = fxzip.analyse(model, x)
    assert repr(spec["first"]) == "ChannelSpace('first', size=6, sites=3, linear)"
    assert spec["first"].linear
    assert not spec["second"].linear
    assert spec["second"].bent == "act acts on each channel, or on several, in a way that is not linear"


def test_halves_of_a_parameter_scale_and_shift() -> None:
    """What is moved out of a parameter is known as the whole is: rotary tables of EVA-02 lie so."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
            self.both = nn.Parameter(torch.randn(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.both.unbind(0)
            return self.second(self.first(x) * scale + shift)

    x = torch.randn(4, 3, dtype=torch.float64)
    model = randomise(Halves(), x)
    assert "both#2" in linear(model, x)
    assert rotation_error(model, x)[""] < EXACT
