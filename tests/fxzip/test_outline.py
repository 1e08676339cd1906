"""The outline: rows that add up to the network's cost, and blocks of a number that can be read."""

from __future__ import annotations

from collections import Counter

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.report import LayerRow, Report
from fxzip.views.outline import FEW, blocks
from tests.fxzip.served import NETWORKS, Small
from tests.nets import Residual


def merged(name: str, **options: object) -> fxzip.ZippedModel:
    make, count, size = NETWORKS[name]
    models = [make() for _ in range(count)]
    return fxzip.zip(*models, [torch.randn(4, 3, size, size)], refit=False, progress=False, **options)


def check_outline(report: Report) -> None:
    """What holds for every outline."""
    for part, cost in zip(("", *report.names), (report.trunk, *report.heads), strict=True):
        rows = [row for row in report.layers if row.part == part]
        assert sum(row.flops for row in rows) == cost.flops
        assert sum(row.params for row in rows) == cost.params
    for place, row in enumerate(report.layers):
        assert all(source < place for source in row.inputs)
        assert all(report.layers[source].part in ("", row.part) for source in row.inputs)
        assert bool(row.inputs) == (row.kind != "input")
    assert [row.part for row in report.layers if row.kind == "output"] == list(report.names)
    seen = {name for row in report.layers for name in row.spaces}
    assert seen <= {space.name for space in report.spaces}
    # A space that no row gives is one of heads or groups, which lie in no tensor's channels alone.
    assert all(space.sites == 0 or space.name in seen for space in report.spaces)


def check_blocks(report: Report) -> None:
    """Blocks hold every row once, without cycles."""
    found = blocks(report.layers)
    held = Counter(row for block in found for row in block.rows)
    assert held == Counter(report.layers)
    graph = nx.DiGraph((source, place) for place, block in enumerate(found) for source in block.inputs)
    assert nx.is_directed_acyclic_graph(graph)
    assert all(source != place for place, block in enumerate(found) for source in block.inputs)
    assert all(block.inputs for block in found if block.kind != "input")


@pytest.mark.parametrize("name", NETWORKS)
def test_outline_of_architectures(name: str) -> None:
    report = merged(name).report
    check_outline(report)
    check_blocks(report)
    assert len(blocks(report.layers)) < 40


def test_resnet18_in_a_dozen_blocks() -> None:
    report = merged("resnet18", cut="layer3", names=("dogs", "birds")).report
    check_outline(report)
    trunk = [block.name for block in blocks(report.layers) if not block.part]
    assert trunk == ["x", "conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    heads = [block.name for block in blocks(report.layers) if block.part == "dogs"]
    assert heads == ["layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc", "output"]


@pytest.mark.parametrize("cut", [None, "layer2", "layer2.conv2", 0.0])
@pytest.mark.parametrize("refit", [False, True])
def test_cuts(cut: str | float | None, refit: bool) -> None:
    models = [Residual(5), Residual(7)]
    zipped = fxzip.zip(*models, [torch.randn(8, 3, 16, 16)], cut=cut, refit=refit, progress=False)
    check_outline(zipped.report)
    check_blocks(zipped.report)


def test_a_row_has_its_spaces_shape_and_kind() -> None:
    report = fxzip.zip(Small(5), Small(5), [torch.randn(8, 3, 12, 12)], refit=False, progress=False).report
    rows = {row.name: row for row in report.layers if not row.part}
    conv = rows["conv2"]
    assert (conv.kind, conv.layer, conv.shape) == ("Conv2d", True, (8, 12, 12))
    assert conv.spaces == ("conv1",)  # the sum ties both convolutions
    assert conv.flops == 2 * 8 * 8 * 9 * 144
    assert conv.params == 8 * 8 * 9 + 8
    total = next(row for row in report.layers if row.kind == "add")
    assert {report.layers[i].name for i in total.inputs} == {"conv2", "bn1"}


class Sized(nn.Module):
    """Reads sizes of a tensor far behind, and has attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).mT
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)
        q, k, v = self.qkv(y).reshape(x.shape[0], y.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 8)
        return self.head((y + self.out(z))[:, 0])


def test_sizes_are_no_edges() -> None:
    report = fxzip.zip(Sized(), Sized(), [torch.randn(4, 3, 16, 16)], refit=False, progress=False).report
    check_outline(report)
    rows = {row.kind: row for row in report.layers}
    attention = rows["scaled_dot_product_attention"]
    assert [report.layers[i].name for i in attention.inputs] == ["qkv"]
    assert attention.flops
    assert not attention.layer


# ---- blocks of made-up rows


def row(name: str, *inputs: int, flops: int = 2, part: str = "", kind: str = "Conv2d") -> LayerRow:
    return LayerRow(name, kind, part, bool(flops), inputs, (), (8,), 1, flops)


def chain(*names: str) -> list[LayerRow]:
    rows = [row("x", flops=0, kind="input")]
    return rows + [row(name, place) for place, name in enumerate(names)]


def names(rows: list[LayerRow], **limits: int) -> list[str]:
    return [block.name for block in blocks(rows, **limits)]


def test_lists_are_opened_but_not_what_is_in_them() -> None:
    rows = chain(*(f"blocks.{i}.{part}.fc" for i in range(12) for part in ("attention", "mlp")))
    assert names(rows) == ["x", *(f"blocks.{i}" for i in range(12))]


def test_small_networks_are_shown_whole() -> None:
    rows = chain("stem", "body.a.conv", "body.b.conv", "head")
    assert names(rows) == ["x", "stem", "body.a.conv", "body.b.conv", "head"]


def test_too_long_lists_stay_closed() -> None:
    rows = chain("stem", *(f"blocks.{i}" for i in range(200)), "head")
    assert names(rows) == ["x", "stem", "blocks", "head"]
    assert len(names(rows, most=300)) == 203


def test_a_level_opens_as_a_whole_or_not_at_all() -> None:
    rows = chain(*(f"stage{s}.{part}" for s in range(4) for part in "abcdefgh"))
    assert names(rows) == ["x", "stage0", "stage1", "stage2", "stage3"]
    assert len(names(rows, few=40)) == 33


def test_what_is_free_joins_the_block_before() -> None:
    rows = [*chain("conv"), row("relu", 1, flops=0), row("fc", 2)]
    assert names(rows) == ["x", "conv", "fc"]
    assert [len(block.rows) for block in blocks(rows)] == [1, 2, 1]


def test_sums_between_modules_are_kept() -> None:
    rows = [*chain("a", "b"), row("add", 1, 2, flops=0, kind="add"), row("c", 3)]
    assert names(rows) == ["x", "a", "b", "add", "c"]
    assert blocks(rows)[3].inputs == (1, 2)


def test_a_module_that_is_called_again_makes_no_cycle() -> None:
    rows = chain(
        *(
            name
            for _ in range(2)
            for name in ("shared.a", "shared.b", *(f"long{i}.{p}" for i in range(20) for p in "ab"))
        )
    )
    found = blocks(rows)
    assert sum(block.name == "shared" for block in found) == 2
    assert all(source < place for place, block in enumerate(found) for source in block.inputs)
    assert len(found) > FEW


def test_a_module_called_output_is_not_the_output() -> None:
    rows = [*chain("output"), row("output", 1, flops=0, kind="output", part="")]
    assert [block.kind for block in blocks(rows)] == ["input", "Conv2d", "output"]
