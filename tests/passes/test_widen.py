"""Networks of different widths: the narrow one is given channels that do nothing, and is merged as any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxzip
from fxzip.errors import RestoreError, WidthWarning
from fxzip.passes.trace import trace
from fxzip.passes.widen import widen
from tests.nets import Net, Residual, conv, snapshot
from tests.oracles import TOLERANCE, call, difference, images, randomise

X = images(24, 8)


def gated(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).relu()
    x = x * m.gate(x.mean((2, 3), keepdim=True)).sigmoid()
    return m.head(m.depthwise(x).relu().mean((2, 3)))


def gated_net(width: int, classes: int = 4) -> Net:
    return Net(
        gated, stem=conv(3, width), gate=nn.Conv2d(width, width, 1), head=nn.Linear(width, classes),
        depthwise=conv(width, width, groups=width),
    )  # fmt: skip


def parts(m: Net, x: Tensor) -> Tensor:
    left, right = m.both(x).relu().chunk(2, 1)
    return m.head(torch.cat([right, left.tanh()], 1).flatten(1))


def parts_net(width: int, classes: int = 4) -> Net:
    return Net(parts, both=conv(3, 2 * width), head=nn.Linear(2 * width * 64, classes))


def attention(m: Net, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).transpose(1, 2)
    q, k, v = m.qkv(tokens).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return m.head(m.proj(mixed.transpose(1, 2).flatten(2)).mean(1))


def attention_net(width: int, classes: int = 4) -> Net:
    return Net(
        attention, patch=nn.Conv2d(3, 8, 4, 4), qkv=nn.Linear(8, 3 * width), proj=nn.Linear(width, 8),
        head=nn.Linear(8, classes),
    )  # fmt: skip


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "residual": lambda width, classes=4: Residual(classes, width=width),
    "gates": gated_net,
    "parts": parts_net,
    "heads": attention_net,
}
WIDTHS = {"residual": (6, 8), "gates": (6, 8), "parts": (6, 8), "heads": (8, 12)}


def traced(model: nn.Module) -> fx.GraphModule:
    return trace(model, (X[:2],), {})


@pytest.mark.parametrize("kind", MAKERS)
def test_a_wider_network_computes_what_it_did(kind: str) -> None:
    narrow, wide = (randomise(MAKERS[kind](width), X) for width in WIDTHS[kind])
    before = snapshot(narrow)
    graphs = [traced(narrow), traced(wide)]
    found = widen(graphs, ((X[:2],), {}))
    assert found[1] is graphs[1]
    assert [p.shape for p in found[0].parameters()] == [p.shape for p in graphs[1].parameters()]
    assert difference(call(graphs[0], X), call(found[0], X)) < TOLERANCE
    assert snapshot(narrow)[0].keys() == before[0].keys()


@pytest.mark.parametrize("kind", MAKERS)
def test_a_network_merged_with_itself_among_dead_channels_is_itself(kind: str) -> None:
    """All that lives is alike, and what is dead makes no difference."""
    narrow, wide = (randomise(MAKERS[kind](width), X) for width in WIDTHS[kind])
    dead = widen([traced(narrow), traced(wide)], ((X[:2],), {}))[0]
    other = fxzip.analyse(dead, X[:2]).permute(dead, torch.Generator().manual_seed(1))
    zipped = fxzip.zip(narrow, other, [X], method="permute", refit=False, progress=False)
    for outputs in zipped(X):
        assert difference(call(narrow, X), outputs) < TOLERANCE


@pytest.mark.parametrize("method", ["zip", "select"])
def test_narrow_and_wide_are_merged_at_the_cost_of_the_wide_one(method: str) -> None:
    narrow, wide = (randomise(Residual(classes, width=width), X) for width, classes in ((6, 4), (9, 5)))
    zipped = fxzip.zip(narrow, wide, [X], method=method, progress=False)
    assert [out.shape for out in zipped(X)] == [(24, 4), (24, 5)]
    assert sum(p.numel() for p in zipped.trunk.parameters()) >= sum(p.numel() for p in narrow.parameters())
    assert zipped.report.fidelity is not None
    assert all(bool(out.isfinite().all()) for out in zipped(X))


def test_three_widths(tmp_path: Path) -> None:
    models = [randomise(gated_net(width), X) for width in (5, 8, 6)]
    zipped = fxzip.zip(*models, [X], cut=0.0, refit=False, progress=False)
    for model, outputs in zip(models, zipped(X), strict=True):
        assert difference(call(model, X), outputs) < TOLERANCE
    merged = fxzip.zip(*models, [X], progress=False)
    merged.save(tmp_path / "merged")
    again = fxzip.load(tmp_path / "merged")
    for one, other in zip(merged(X), again(X), strict=True):
        assert torch.equal(one, other)


def test_what_a_norm_reads_cannot_be_widened_and_says_so() -> None:
    def make(width: int) -> Net:
        return Net(
            lambda m, x: m.head(m.norm(m.last(m.first(x).relu()).flatten(2).transpose(1, 2)).mean(1)),
            first=conv(3, 6), last=conv(6, width), norm=nn.LayerNorm(width), head=nn.Linear(width, 4),
        )  # fmt: skip

    models = [randomise(make(width), X) for width in (6, 8)]
    with pytest.warns(WidthWarning, match="model 0 cannot be made wider"):
        prepared = fxzip.prepare(*models, example_inputs=X[:2])
    assert prepared.alignment.parting is not None


def test_classifiers_of_other_classes_are_no_other_width() -> None:
    graphs = [traced(randomise(Residual(classes), X)) for classes in (4, 7)]
    assert all(a is b for a, b in zip(graphs, widen(graphs, ((X[:2],), {})), strict=True))


def test_the_models_own_classes_cannot_hold_another_width() -> None:
    models = [randomise(gated_net(width), X) for width in (6, 8)]
    zipped = fxzip.zip(*map(copy.deepcopy, models), [X], progress=False)
    with pytest.raises(RestoreError, match="different widths"):
        zipped.as_models()
