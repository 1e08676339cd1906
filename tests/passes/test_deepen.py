"""Networks that differ by residual blocks: the shallow one is given blocks that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.align import align
from fxzip.passes.deepen import deepen, residual_blocks
from fxzip.passes.trace import trace
from fxzip.passes.widen import widen
from tests.nets import Block, conv
from tests.oracles import TOLERANCE, call, difference, images, randomise

X = images(24, 8)
EXAMPLE: tuple[tuple[Tensor], dict[str, Any]] = ((X[:2],), {})


class Stages(nn.Module):
    """Two stages of residual blocks, the second of which begins with another width."""

    def __init__(self, blocks: tuple[int, int], width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.first = nn.Sequential(*(Block(width, width, nn.BatchNorm2d) for _ in range(blocks[0])))
        wider = [Block(width, width + 2, nn.BatchNorm2d)]
        self.second = nn.Sequential(*wider, *(Block(width + 2, width + 2, nn.BatchNorm2d) for _ in range(blocks[1])))
        self.fc = nn.Linear(width + 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.max_pool2d(self.first(F.relu(self.stem(x))), 2))
        return self.fc(x.mean((2, 3)))


class Layers(nn.Module):
    """A transformer whose layers have two residual branches each."""

    def __init__(self, depth: int, classes: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.scale = nn.ParameterList(torch.ones(8) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2 * depth))
        self.mix = nn.ModuleList(nn.Linear(8, 24) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(depth))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for k, (mix, up, down) in enumerate(zip(self.mix, self.up, self.down, strict=True)):
            q, key, v = mix(self.norms[2 * k](x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + F.scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2)
            x = x + down(F.gelu(up(self.norms[2 * k + 1](x)))) * self.scale[k]
        return self.head(x.mean(1))


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "blocks behind a first one": (lambda: Stages((1, 1)), lambda: Stages((3, 2))),
    "stages of no blocks": (lambda: Stages((0, 0)), lambda: Stages((1, 1))),
    "other classes": (lambda: Stages((1, 0), classes=7), lambda: Stages((2, 1))),
    "transformer": (lambda: Layers(2), lambda: Layers(3)),
}


def traced(model: nn.Module) -> fx.GraphModule:
    return trace(model, (X[:2],), {})


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("deep_first", [False, True])
def test_a_deeper_network_computes_what_it_did(kind: str, deep_first: bool) -> None:
    shallow, deep = (traced(randomise(make(), X)) for make in PAIRS[kind])
    before = dict(shallow.state_dict())
    graphs = [deep, shallow] if deep_first else [shallow, deep]
    found = deepen(graphs, EXAMPLE)
    deeper = found[1] if deep_first else found[0]
    assert (found[0] if deep_first else found[1]) is deep
    assert len(deeper.graph.nodes) == len(deep.graph.nodes)
    assert difference(call(shallow, X), call(deeper, X)) < TOLERANCE
    assert dict(shallow.state_dict()).keys() == before.keys()
    alignment = align(found)
    assert alignment.parting is None or "out_features" in alignment.parting


def test_blocks_stay_where_they_were_by_their_share_of_the_depth() -> None:
    shallow, deep = (traced(randomise(Stages((blocks, 0)), X)) for blocks in (2, 4))
    found = deepen([shallow, deep], EXAMPLE)[0]
    names = [str(node.target) for node in found.graph.nodes if "conv1" in str(node.target)]
    assert names[0] == "first.0.conv1"
    assert names[2] == "first.1.conv1"


def test_a_network_merged_with_its_deeper_self_is_itself() -> None:
    """A block of zeros and none are the same function."""
    shallow = randomise(Stages((1, 1)), X)
    deeper = deepen([traced(shallow), traced(randomise(Stages((2, 3)), X))], EXAMPLE)[0]
    other = fxzip.analyse(deeper, X[:2]).permute(deeper, torch.Generator().manual_seed(1))
    zipped = fxzip.zip(shallow, other, [X], method="permute", refit=False, progress=False)
    for outputs in zipped(X):
        assert difference(call(shallow, X), outputs) < TOLERANCE


def test_deep_and_shallow_are_merged(tmp_path: Path) -> None:
    models = [randomise(Stages((1, 0), classes=5), X), randomise(Stages((2, 1)), X)]
    zipped = fxzip.zip(*models, [X], progress=False)
    assert [out.shape for out in zipped(X)] == [(24, 5), (24, 4)]
    zipped.save(tmp_path / "merged")
    for one, other in zip(zipped(X), fxzip.load(tmp_path / "merged")(X), strict=True):
        assert torch.equal(one, other)
    ensemble = fxzip.zip(*models, [X], cut=0.0, refit=False, progress=False)
    for model, outputs in zip(models, ensemble(X), strict=True):
        assert difference(call(model, X), outputs) < TOLERANCE


def test_narrow_and_shallow_at_once() -> None:
    shallow, deep = traced(randomise(Stages((1, 1), width=4), X)), traced(randomise(Stages((2, 2), width=6), X))
    found = widen(deepen([shallow, deep], EXAMPLE), EXAMPLE)
    assert align(found).parting is None
    assert difference(call(shallow, X), call(found[0], X)) < TOLERANCE


def test_what_differs_otherwise_stays_as_it_is() -> None:
    class Plain(nn.Module):
        """A convolution where the other network has a block."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.more, self.fc = conv(3, 6), conv(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.more(F.relu(self.stem(x)))).mean((2, 3)))

    graphs = [traced(randomise(Plain(), X)), traced(randomise(Stages((1, 0)), X))]
    assert deepen(graphs, EXAMPLE) == graphs


def test_a_block_is_closed() -> None:
    """What is read from outside, or reads what its source does not give, cannot be left out."""

    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 3), conv(3, 3), conv(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.a(x)
            return x + self.b(inner) + inner + self.c(x)

    blocks = list(residual_blocks(traced(randomise(Open(), X))))
    assert [[node.name for node in block.nodes] for block in blocks] == []
