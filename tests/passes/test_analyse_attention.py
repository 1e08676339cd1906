"""The analysis of attention in its many forms, on small networks: oracles 1, 2 and 4, and what must be found."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from tests.nets import Net
from tests.oracles import TOLERANCE, call, difference, mutations_missed, randomise, self_zip_errors

HEADS, DIM, WIDTH, TOKENS = 4, 4, 16, 16
LINEAR = nn.Linear


class Table(nn.Module):
    """A parameter of a shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def example() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tokens(m: Net, x: Tensor) -> Tensor:
    return m.embed(x).flatten(2).transpose(1, 2)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def separate(m: Net, x: Tensor, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    x = m.norm(x)
    return heads(m.q(x)), heads(m.k(x), groups), heads(m.v(x), groups)


def finish(m: Net, x: Tensor, out: Tensor) -> Tensor:
    x = x + m.proj(joined(out))
    return m.head(x.mean(1))


def plain(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x)
    return finish(m, x, F.scaled_dot_product_attention(q, k, v))


def rotary(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x)
    angle = torch.arange(TOKENS, dtype=x.dtype)[:, None] / torch.tensor([1.0, 1.0, 7.0, 7.0], dtype=x.dtype)

    def turned(y: Tensor) -> Tensor:
        other = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
        return y * angle.cos() + other * angle.sin()

    return finish(m, x, F.scaled_dot_product_attention(turned(q), turned(k), v))


def grouped_queries(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x, 2)
    return finish(m, x, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def repeated_keys(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x, 2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return finish(m, x, (q @ k.transpose(-2, -1)).softmax(-1) @ v)


def one_key(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x, 1)
    return finish(m, x, F.scaled_dot_product_attention(q, k, v))


def normed_queries(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x)
    return finish(m, x, F.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v))


def talking_heads(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    q, k, v = separate(m, x)
    logits = m.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
    return finish(m, x, m.after(logits).permute(0, 3, 1, 2) @ v)


def over_channels(m: Net, x: Tensor) -> Tensor:
    """XCiT: attention between the channels of a head."""
    x = tokens(m, x)
    q, k, v = (y.transpose(-2, -1) for y in separate(m, x))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    out = (q @ k.transpose(-2, -1) * m.temperature.weight).softmax(-1) @ v
    return finish(m, x, out.transpose(-2, -1))


def class_token(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    x = torch.cat([m.token.weight.expand(x.shape[0], -1, -1), x], 1) + m.places.weight
    q, k, v = separate(m, x)
    x = x + m.proj(joined(F.scaled_dot_product_attention(q, k, v)))
    return m.head(m.last(x)[:, 0])


def late_class_token(m: Net, x: Tensor) -> Tensor:
    x = tokens(m, x)
    x = torch.cat([m.token.weight.expand(x.shape[0], -1, -1), x], 1)
    q, k, v = separate(m, x)
    x = m.last(x) + m.proj(joined(F.scaled_dot_product_attention(q, k, v)))
    return m.head(x[:, 0])


def shifted_windows(m: Net, x: Tensor) -> Tensor:
    x = m.embed(x).permute(0, 2, 3, 1)
    b, side = x.shape[0], 4
    y = torch.roll(x, (-1, -1), (1, 2)).view(b, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 4, WIDTH)
    q, k, v = separate(m, y)
    bias = m.table.weight[torch.arange(16) % 9].view(4, 4, HEADS).permute(2, 0, 1)
    y = m.proj(joined((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v))
    y = y.view(b, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, WIDTH)
    return m.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))


def outlook(m: Net, x: Tensor) -> Tensor:
    """VOLO: weights of a neighbourhood come from its centre, and overlapping neighbourhoods are summed."""
    x = m.embed(x).permute(0, 2, 3, 1)
    b, h, w, _ = x.shape
    v = F.unfold(m.v(x).permute(0, 3, 1, 2), 3, padding=1).reshape(b, HEADS, DIM, 9, h * w).permute(0, 1, 4, 3, 2)
    a = m.a(x).reshape(b, h * w, HEADS, 9, 9).permute(0, 2, 1, 3, 4).softmax(-1)
    y = (a @ v).permute(0, 1, 4, 3, 2).reshape(b, WIDTH * 9, h * w)
    y = F.fold(y, (h, w), 3, padding=1).permute(0, 2, 3, 1)
    return m.head((x + m.proj(y)).mean((1, 2)))


def bilinear(m: Net, x: Tensor) -> Tensor:
    """Rows of pixels are mixed by maps that the image gives for each group of channels."""
    x = m.embed(x)
    p = m.p(F.adaptive_max_pool2d(x, (4, 1))).view(x.shape[0], HEADS, 1, 4, 4).sigmoid()
    p = (p / p.sum(3, keepdim=True)).expand(-1, HEADS, DIM, 4, 4).reshape(x.shape[0], WIDTH, 4, 4)
    return m.head(m.mix(p @ x).mean((2, 3)))


def net(body: object, groups: int = HEADS, **more: nn.Module) -> Net:
    kv = groups * DIM
    # A bias of the keys adds the same to all logits of a query, which softmax does not see.
    k, v = LINEAR(WIDTH, kv, bias=False), LINEAR(WIDTH, kv)
    layers = {"norm": nn.LayerNorm(WIDTH), "q": LINEAR(WIDTH, WIDTH), "k": k, "v": v}
    return Net(
        body, embed=nn.Conv2d(3, WIDTH, 2, 2), **layers, **more, proj=LINEAR(WIDTH, WIDTH), head=LINEAR(WIDTH, 3)
    )


def make(name: str) -> Net:
    torch.manual_seed(0)
    embed, head = nn.Conv2d(3, WIDTH, 2, 2), LINEAR(WIDTH, 3)
    return {
        "plain": lambda: net(plain),
        "rotary": lambda: net(rotary),
        "grouped queries": lambda: net(grouped_queries, 2),
        "repeated keys": lambda: net(repeated_keys, 2),
        "one key": lambda: net(one_key, 1),
        "norms of queries and keys": lambda: net(normed_queries, q_norm=nn.LayerNorm(DIM), k_norm=nn.RMSNorm(DIM)),
        "talking heads": lambda: net(
            talking_heads, before=LINEAR(HEADS, HEADS, bias=False), after=LINEAR(HEADS, HEADS)
        ),
        "over channels": lambda: net(over_channels, temperature=Table(HEADS, 1, 1)),
        "class token": lambda: net(
            class_token, token=Table(1, 1, WIDTH), places=Table(1, TOKENS + 1, WIDTH), last=nn.LayerNorm(WIDTH)
        ),
        "late class token": lambda: net(late_class_token, token=Table(1, 1, WIDTH), last=nn.LayerNorm(WIDTH)),
        "shifted windows": lambda: net(shifted_windows, table=Table(9, HEADS)),
        "outlook": lambda: Net(
            outlook, embed=embed, v=LINEAR(WIDTH, WIDTH), a=LINEAR(WIDTH, HEADS * 81), proj=LINEAR(WIDTH, WIDTH),
            head=head,
        ),
        "bilinear": lambda: Net(
            bilinear, embed=embed, p=nn.Conv2d(WIDTH, HEADS * 16, (4, 1)), mix=nn.Conv2d(WIDTH, 8, 1), head=LINEAR(8, 3)
        ),
    }[name]()  # fmt: skip


CASES = (
    "plain", "rotary", "grouped queries", "repeated keys", "one key", "norms of queries and keys", "talking heads",
    "over channels", "class token", "late class token", "shifted windows", "outlook",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_permutation_of_all_spaces_is_no_change_and_each_site_matters(name: str) -> None:
    x = example()
    model = randomise(make(name), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxzip.FrozenSpaceWarning)
        spec = fxzip.analyse(model, x)
    assert spec.coverage > 0.9, str(spec)
    assert not spec.frozen
    moved = spec.permute(model)
    assert difference(call(model, x), call(moved, x)) < TOLERANCE
    assert mutations_missed(moved, x, spec, most=100) == []


@pytest.mark.parametrize("name", CASES)
def test_a_self_zip_is_the_network_again_wherever_it_is_cut(name: str) -> None:
    x = example()
    errors = self_zip_errors(randomise(make(name), x), x, step=3)
    assert len(errors) > 2
    assert max(errors.values()) < TOLERANCE, errors


def test_rotary_queries_move_by_whole_heads_and_values_inside_them() -> None:
    spec = fxzip.analyse(make("rotary").double(), example())
    whole = spec["q"]
    assert whole.size == HEADS
    assert {site.parameter: tuple(site.index.shape) for site in whole.sites if site.axis == 0} == {
        "q.weight": (HEADS, DIM), "q.bias": (HEADS, DIM), "k.weight": (HEADS, DIM),
    }  # fmt: skip
    assert (spec["v"].size, spec["v"].parent) == (WIDTH, "q")


def test_the_residual_stream_of_a_transformer_is_one_space() -> None:
    spec = fxzip.analyse(make("class token").double(), example())
    touched = {site.parameter for site in spec["embed"].sites}
    assert {"embed.weight", "token.weight", "places.weight", "norm.weight", "proj.weight", "head.weight"} <= touched


def test_queries_that_share_a_key_are_copies_of_it() -> None:
    spec = fxzip.analyse(make("grouped queries").double(), example())
    for name in ("q", "q#2"):  # the two heads of a group are copies
        found = {site.parameter: len(site.index.reshape(-1)) for site in spec[name].sites}
        assert found["q.weight"] == 2 * found["k.weight"]


def test_maps_that_the_image_gives_for_rows_of_pixels_are_never_mixed_up() -> None:
    x = example()
    model = randomise(make("bilinear"), x)
    spec = fxzip.analyse(model, x)
    assert difference(call(model, x), call(spec.permute(model), x)) < TOLERANCE
