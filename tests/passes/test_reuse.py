"""Numbered as the conditions at the head of passes/reuse.py."""

from __future__ import annotations

import copy
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxzip
from fxzip.graphs import writes_in_place
from fxzip.passes.reuse import reuse_memory
from fxzip.passes.trace import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()


class Block(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


class Functions(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x)) + F.relu(self.other(x))


class OnInput(Net):  # 1: the user's own tensor
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x))


class OnView(Net):  # 1: a view of what is read later
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(y.flatten(1)).sum() + y.sum()


class ReadLater(Net):  # 2
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(y) * self.other(y)


class ViewReadLater(Net):  # 2: a user that comes before, whose result is a view
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        flat = y.flatten(1)
        return self.relu(y).flatten(1) - flat


class SumInView(Net):  # 1: a sum that writes to a view of what is read later
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        part = y[:, :2]
        part += x[:, :2]
        return self.relu(part) - y[:, :2]


class Twice(Net):  # one call may, the other may not
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return self.relu(y) - y * x


class Broadcast(Net):  # 3
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3), keepdim=True) + self.conv(x)[:, :, :1] + self.other(x)


def rewritten(net: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    traced = trace(net, (torch.randn(2, 3, 5, 5),))
    reuse_memory(traced)
    traced.graph.lint()
    return traced, [node.name for node in traced.graph.nodes if writes_in_place(node, traced)]


@pytest.mark.parametrize(
    "net", [Block, Functions, OnInput, OnView, ReadLater, ViewReadLater, SumInView, Twice, Broadcast]
)
def test_the_function_and_the_input_stay(net: type[Net]) -> None:
    torch.manual_seed(0)
    model = net().eval()
    module, _ = rewritten(model)
    x = torch.randn(4, 3, 5, 5)
    given = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(given))
    assert torch.equal(x, given)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Block, ["add", "relu"]),
        (Functions, ["silu", "relu"]),
        *((net, []) for net in (OnInput, OnView, ReadLater, ViewReadLater, Twice)),
    ],
)
def test_what_works_in_place(net: type[Net], expected: list[str]) -> None:
    assert rewritten(net().eval())[1] == expected


def test_a_sum_writes_to_the_operand_of_its_own_shape() -> None:
    module, names = rewritten(Broadcast().eval())
    (last,) = (node for node in module.graph.nodes if node.name in names)
    assert last.target is operator.iadd
    assert last.args[0].name == "other"


class Transposed(nn.Module):  # 3: the sum has the strides of its first operand
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous() + self.second(x)


def test_a_sum_keeps_its_memory_format() -> None:
    x = torch.randn(2, 4, 5, 5)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        graph = trace(Transposed(), (given,))
        expected = graph(given)
        reuse_memory(graph)
        assert graph(given).stride() == expected.stride()
        assert torch.equal(graph(given), expected)


def test_the_given_submodules_are_not_changed() -> None:
    traced = trace(Block().eval(), (torch.randn(2, 3, 5, 5),))
    relu = traced.get_submodule("relu")
    reuse_memory(traced)
    assert traced.get_submodule("relu") is not relu
    assert relu.inplace is False


class Residual(nn.Module):
    """The head reads, through a skip and through a layer, what crosses the cut."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.first(x) + x)
        x = self.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("cut", ["second", None])
@pytest.mark.parametrize("refit", [True, False])
def test_a_merged_network_works_in_place_and_its_heads_do_not_disturb_each_other(
    cut: str | None, refit: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    models = [Residual(5).eval(), Residual(4).eval()]
    zipped = fxzip.zip(*models, [x], cut=cut, refit=refit, progress=False)
    again = fxzip.load(zipped.save(tmp_path / "saved"))
    for network in (zipped, again):
        parts = [network.trunk, *network.heads.values()]
        assert any(writes_in_place(node, part) for part in parts for node in part.graph.nodes)
        given = x.clone()
        with torch.no_grad():
            together = network(given)
            crossing = network.trunk(given)
            kept = [t.clone() for t in crossing]
            alone = [network.head(name)(*crossing) for name in network.names]
        assert torch.equal(given, x)
        assert all(torch.equal(a, b) for a, b in zip(crossing, kept, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_merged_network_can_still_be_trained() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    zipped = fxzip.zip(Residual(5).eval(), Residual(4).eval(), [x], cut="second", refit=False, progress=False)
    sum(out.square().sum() for out in zipped(x)).backward()
    assert all(p.grad is not None for p in zipped.trunk.parameters())


def test_a_sum_that_the_model_makes_in_place_is_not_fresh() -> None:
    torch.manual_seed(0)
    model = SumInView().eval()
    traced = trace(model, (torch.randn(2, 3, 5, 5),))
    as_written = copy.deepcopy(traced)
    _sum_in_place(as_written)
    x = torch.randn(4, 3, 5, 5)
    for graph in (traced, as_written):
        reuse_memory(graph)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x))


def _sum_in_place(traced: fx.GraphModule) -> None:
    """Give back to a traced SumInView the sum in place that tracing took out, as a graph from a user may have it."""
    (total,) = (node for node in traced.graph.nodes if node.target is operator.add)
    (scattered,) = total.users
    relu_input = next(user for user in scattered.users if any(reader.name == "relu" for reader in user.users))
    total.target = operator.iadd
    relu_input.replace_all_uses_with(total)
    traced.graph.erase_node(relu_input)
    scattered.replace_all_uses_with(scattered.args[0])
    traced.graph.erase_node(scattered)
    traced.recompile()
