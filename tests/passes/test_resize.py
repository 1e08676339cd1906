"""Resize: sizes follow labels, exactly; what cannot change says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.resize import ResizeError, resize
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier, fixed_sizes, width_error
from fxzip.testing import TOLERANCE, dropping_error, images, padding_error, randomise
from tests.nets import Net, Residual, chain, conv

X = images(4, 8)


class Attention(nn.Module):
    """Heads in a packed projection, a table for each head, and an MLP, without norms over channels."""

    def __init__(self, heads: int = 4, width: int = 3) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.qkv = nn.Linear(8, 3 * heads * width)
        self.table = nn.Parameter(torch.zeros(heads, 16, 16))
        self.proj, self.up, self.down = nn.Linear(heads * width, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(x.shape[0], 16, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * self.width**-0.5 + self.table).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(x.shape[0], 16, self.heads * self.width))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Folded(nn.Module):
    """Heads that are folded into the batch: the size of a view is computed from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 12), conv(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.view(x.shape[0] * 4, 3, 8, 8).softmax(1).view(x.shape[0], 12, 8, 8)
        return self.head(self.second(y).mean((2, 3)))


def split(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    a, b = torch.split(y, [6, 4], 1)
    return m.head(m.last(torch.cat([m.left(a), b, m.left(a).narrow(1, 0, 5)], 1)).mean((2, 3)))


def sliced(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.head((m.left(y[:, :6]) + m.right(y[:, 6:10])).mean((2, 3)))


def shuffled(m: Net, x: Tensor) -> Tensor:
    a, b = m.stem(x).chunk(2, 1)
    y = torch.cat([m.left(a), b], 1)
    y = y.view(x.shape[0], 2, 5, 8, 8).transpose(1, 2).reshape(x.shape[0], 10, 8, 8)
    return m.head(m.last(y).mean((2, 3)))


def flattened(m: Net, x: Tensor) -> Tensor:
    return m.head(F.max_pool2d(m.stem(x), 4).reshape(-1, 40))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "attention": Attention,
    "folded": Folded,
    "depthwise": lambda: Net(chain, a=conv(3, 6), b=conv(6, 6, groups=6), n=nn.BatchNorm2d(6), head=nn.Linear(6, 5)),
    "grouped": lambda: Net(chain, a=conv(3, 8), b=conv(8, 12, groups=4), n=nn.GroupNorm(4, 12), head=nn.Linear(12, 5)),
    "transposed": lambda: Net(chain, a=conv(3, 6), b=nn.ConvTranspose2d(6, 8, 2, groups=2), head=nn.Linear(8, 5)),
    "split": lambda: Net(split, stem=conv(3, 10), left=conv(6, 5), last=conv(14, 6), head=nn.Linear(6, 5)),
    "sliced": lambda: Net(sliced, stem=conv(3, 10), left=conv(6, 5), right=conv(4, 5), head=nn.Linear(5, 5)),
    "shuffled": lambda: Net(shuffled, stem=conv(3, 10), left=conv(5, 5), last=conv(10, 6), head=nn.Linear(6, 5)),
    "flattened": lambda: Net(flattened, stem=conv(3, 10), head=nn.Linear(40, 5)),
}  # fmt: skip


def analysed(model: nn.Module, x: Any = X) -> tuple[Any, Any]:
    module = canonicalise(trace(model, (x,), {}))
    return module, analyse_graph(module, (x,), {})


@pytest.mark.parametrize("name", NETS)
def test_dead_channels_and_copies_change_nothing(name: str) -> None:
    model = randomise(NETS[name](), X)
    assert padding_error(model, X) < TOLERANCE
    assert dropping_error(model, X, seed=1) < TOLERANCE


def test_every_space_of_these_can_change() -> None:
    for name, make in NETS.items():
        module, spec = analysed(randomise(make(), X))
        fixed = fixed_sizes(Verifier(module, ((X,), {})), spec)
        assert spec.spaces, name
        if name == "shuffled":  # two halves that take turns must have one size
            assert 0 < len(fixed) < sum(space.parent is None for space in spec.spaces)
        else:
            assert fixed == {}, name


def test_any_numbers_of_channels_merge_with_themselves() -> None:
    for name in ("residual", "attention", "grouped", "split"):
        module, spec = analysed(randomise(NETS[name](), X))
        roots = [space for space in spec.spaces if space.parent is None]
        for kept in (None, ()):
            blocks = {s.name: max(2, s.size - 1 - k % 2) if k % 2 else s.size + 1 for k, s in enumerate(roots)}
            assert width_error(Verifier(module, ((X,), {})), spec, blocks, kept) < TOLERANCE, name


def test_the_graph_has_the_sizes() -> None:
    module, spec = analysed(randomise(Attention(), X))
    heads = next(s for s in spec.spaces if s.parent is None and spec.children(s.name) and s.size == 4)
    found = resize(module, spec, {heads.name: 6})
    assert found.module.qkv.weight.shape == (54, 8)
    assert (found.module.qkv.in_features, found.module.qkv.out_features) == (8, 54)
    assert found.module.table.shape == (6, 16, 16)
    assert found.module.proj.weight.shape == (8, 18)
    assert module.qkv.weight.shape == (36, 8)
    views = [node.args for node in found.module.graph.nodes if node.target == "reshape"]
    assert any(6 in (part for part in args[1:]) or 6 in args[1] for args in views if len(args) > 1)


def test_a_norm_over_channels_keeps_their_number() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5)
            self.c, self.d = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.norm(self.a(x))).softmax(-1)))

    _, spec = analysed(randomise(Normed(), torch.randn(6, 4).double()), torch.randn(6, 4).double())
    reasons = {space.name: space.fixed for space in spec.spaces}
    assert reasons == {
        "a": "norm sums over its channels without weights",
        "b": "softmax sums over its channels without weights",
        "c": None,
    }
    assert spec["c"].resizable
    assert not spec["a"].resizable


def test_what_cannot_follow_is_an_error_that_names_the_node() -> None:
    model = randomise(Net(lambda m, x: m.b(m.a(x)[:, ::2]).mean((2, 3)), a=conv(3, 8), b=conv(4, 5)), X)
    module, spec = analysed(model)
    with pytest.raises(ResizeError, match=r"getitem.*in steps"):
        resize(module, spec, {spec.spaces[0].name: spec.spaces[0].size + 2})
    found = fixed_sizes(Verifier(module, ((X,), {})), spec)
    assert list(found) == [space.name for space in spec.spaces if space.parent is None]
    assert all("in steps" in reason for reason in found.values())


def test_without_other_sizes_nothing_is_resized() -> None:
    module, spec = analysed(randomise(Residual(), X))
    found = resize(module, spec, {space.name: space.size for space in spec.spaces})
    assert found.blocks == {}
    for (name, old), new in zip(module.state_dict().items(), found.module.state_dict().values(), strict=True):
        assert torch.equal(old, new), name


def test_a_wrong_size_is_noticed() -> None:
    """The oracle can fail: a copy of a channel whose outgoing weights are not halved is off."""
    from fxzip.testing import widths

    model = randomise(Residual(), X)
    honest = widths._copied

    def careless(*given: Any) -> Any:
        found = honest(*given)
        return fxzip.MergeMap(1, None, (found.merge, found.merge.T.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "_copied", careless)
        assert dropping_error(model, X) > 1e-3
