"""Functionalisation: every way to write, through every view, against what PyTorch itself computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.errors import TraceError
from fxzip.passes.trace import trace
from fxzip.passes.trace.functional import has_writes

X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
aten: Any = torch.ops.aten

# Each gives a view of a (batch, 4, 6) tensor.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "slice": lambda y: y[:, 1:3],
    "slice from behind": lambda y: y[:, -3:-1, ::2],
    "ellipsis": lambda y: y[..., 2],
    "index and new axis": lambda y: y[:, 0, None, 1:],
    "batch": lambda y: y[1:],
    "view": lambda y: y.view(y.shape[0], -1)[:, 3:9],
    "reshape": lambda y: y.reshape(-1, 6),
    "flatten": lambda y: y.flatten(1)[:, ::3],
    "unflatten": lambda y: y.unflatten(2, (2, 3))[:, :, 1],
    "squeeze": lambda y: y[:, :1].squeeze(1),
    "unsqueeze": lambda y: y.unsqueeze(1)[:, :, 2],
    "expand of itself": lambda y: y.expand(-1, -1, 6),
    "permute": lambda y: y.permute(2, 0, 1)[:3],
    "transpose": lambda y: y.transpose(1, 2)[:, 4],
    "mT": lambda y: y.mT[:, 1:2],
    "T": lambda y: y[0].T[1:4],
    "movedim": lambda y: torch.movedim(y, -1, 0)[1],
    "swapaxes": lambda y: torch.swapaxes(y, 0, 2)[0],
    "select": lambda y: y.select(1, -1),
    "narrow": lambda y: torch.narrow(y, 2, 1, 3),
    "narrow from behind": lambda y: y.narrow(1, -2, 2),
    "split": lambda y: y.split(2, 1)[1],
    "split by sizes": lambda y: torch.split(y, [1, 2, 1], dim=1)[1],
    "chunk": lambda y: y.chunk(3, 2)[0],
    "chunk by keyword": lambda y: torch.chunk(input=y, chunks=2, dim=-1)[-1],
    "chunk of the batch": lambda y: y.chunk(2)[1],
    "tensor_split": lambda y: y.tensor_split((1, 3), dim=1)[1],
    "unbind": lambda y: y.unbind(1)[2],
    "iteration": lambda y: next(iter(y.movedim(1, 0))),
    "diagonal": lambda y: y.diagonal(1, 1, 2),
    "linalg.diagonal": lambda y: torch.linalg.diagonal(y),
    "data": lambda y: y.data[:, 2:],
    "detach": lambda y: y.detach()[:, :1],
    "contiguous": lambda y: y.contiguous()[:, 3],
    "to": lambda y: y.to(torch.float64),
    "view_as": lambda y: y.view_as(y)[:, 1],
    "aten": lambda y: aten.select.int(aten.slice.Tensor(y, 1, 1, 3), 2, 0),
    "aten transposed": lambda y: aten.transpose.int(aten.alias.default(y), 1, 2)[:, 2],
    "two steps": lambda y: y[:, 1:].transpose(1, 2)[:, 2:5].flatten(1)[:, 1:4],
}

# Each writes to a view v; y is the whole.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda v: v.mul_(2),
    "+=": lambda v: v.__iadd__(v * v),
    "torch.relu_": lambda v: torch.relu_(v),
    "F.elu_": lambda v: F.elu_(v),
    "inplace=True": lambda v: F.relu(v, inplace=True),
    "inplace by position": lambda v: F.leaky_relu(v, 0.1, True),
    "module": lambda v: nn.Hardtanh(-0.5, 0.5, inplace=True)(v),
    "clamp_ by keyword": lambda v: v.clamp_(min=-0.1, max=0.2),
    "copy_": lambda v: v.copy_(v.exp().float()),
    "copy_ broadcast": lambda v: v.copy_(torch.arange(v.shape[-1])),
    "fill_": lambda v: v.fill_(3),
    "zero_": lambda v: v.zero_(),
    "out=": lambda v: torch.sin(v.clone(), out=v),
    "[...] =": lambda v: v.__setitem__(Ellipsis, 1.5),
    "[0] =": lambda v: v.__setitem__(0, v[0] * 3),
    "[mask] =": lambda v: v.__setitem__(v > 0, -1.0),
    "masked_fill_": lambda v: v.masked_fill_(v > 0, 7.0),
    "[..., list] =": lambda v: v.__setitem__((Ellipsis, [0]), 5.0),
    "[..., tensor] =": lambda v: v.__setitem__((Ellipsis, torch.tensor([0])), v[..., :1] + 1),
    "index_fill_": lambda v: v.index_fill_(-1, torch.tensor([0]), 9.0),
    "other dtype": lambda v: v.copysign_(torch.tensor(-1.0)),
    "gt_": lambda v: v.gt_(0),
    "aten.add_": lambda v: aten.add_.Tensor(v, v, alpha=2),
    "aten.relu_": lambda v: aten.relu_.default(v),
    "aten.fill_": lambda v: aten.fill_.Scalar(v, 2),
    "aten.copy_": lambda v: aten.copy_.default(v, v * 4),
    "twice": lambda v: v.add_(1).mul_(v),
}


class Net(nn.Module):
    """A linear layer, and then a function of its output."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6).double()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc(x))


def check(function: Callable[[Tensor], Any], x: Tensor = X) -> fx.GraphModule:
    """The graph of a `Net`, which writes to nothing and computes what the net does, at two batch sizes."""
    torch.manual_seed(0)
    model = Net(function).eval()
    graph_module = trace(model, (x,))
    graph_module.graph.lint()
    assert not has_writes(graph_module)
    assert graph_module.meta["traced_by"] == "symbolic", graph_module.meta["passed_over"]
    for size in (2, 5):
        batch = torch.randn(size, *x.shape[1:], dtype=torch.float64)
        kept = batch.clone()
        with torch.no_grad():
            expected, actual = model(batch.clone()), graph_module(batch)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(batch, kept)
    return graph_module


def results(y: Tensor, view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
    """What all that looks at one memory gives after it was written to through a view, and what was read before."""
    z = y * 1
    before, other, v = z + 0, z.view(z.shape[0], -1), view(z)
    write(v)
    return z, before, other * 2, v + 1, view(z)


@pytest.mark.parametrize("write", ["mul_", "copy_", "[mask] ="])
def test_every_view_is_written_through(write: str) -> None:
    check(lambda y: [results(y, view, WRITES[write]) for view in VIEWS.values()])


@pytest.mark.parametrize("view", ["itself", "slice", "two steps"])
def test_every_way_to_write(view: str) -> None:
    check(lambda y: [results(y, VIEWS[view], write) for write in WRITES.values()])


def test_two_views_of_one_tensor_see_each_other() -> None:
    def written(y: Tensor) -> list[tuple[Tensor, ...]]:
        found = []
        for first, second in itertools.pairwise(VIEWS.values()):
            z = y * 1
            one, two = first(z), second(z)
            one.mul_(3)
            two.add_(1)
            one.sub_(y.mean())
            found.append((z, one, two))
        return found

    check(written)


def test_a_graph_without_writes_is_left_as_it_is() -> None:
    graph_module = check(lambda y: y.view(y.shape[0], -1)[:, :3] + 1)
    assert [n.name for n in graph_module.graph.nodes] == ["x", "fc", "view", "getitem", "add", "output"]


def test_a_view_that_is_not_known_is_named() -> None:
    with pytest.raises(TraceError, match="unfold"):
        trace(Net(lambda y: (y.unfold(2, 2, 2).mul_(2), y)[1]).eval(), (X,))


class Shared(nn.Module):
    """Two tensors of one memory, of which one is written to, and the other is read before that or after it."""

    def __init__(self, is_buffer: bool, late: bool) -> None:
        super().__init__()
        self.late = late
        self.fc = nn.Linear(6, 6).double()
        self.register_buffer("whole", torch.zeros(4, 6, dtype=torch.float64))
        part = self.whole[1:]  # type: ignore[index]
        if is_buffer:
            self.register_buffer("part", part)
        else:
            self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + (0 if self.late else self.part[0])
        self.whole.add_(1)  # type: ignore[operator]
        return y + (self.part[0] if self.late else 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("is_buffer", [True, False])
def test_memory_that_is_shared_behind_the_graph_s_back_is_refused(is_buffer: bool, late: bool) -> None:
    """No node takes the view, so what it looks at after the write is not known."""
    with pytest.raises(TraceError, match=r"shares memory with a tensor that was written to|memory that is shared"):
        trace(Shared(is_buffer, late).eval(), (X,))


class Views(nn.Module):
    """A value, a view of it, and a view of that, each used after all that was written through the others."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        view = y.view(y.shape[0], -1)
        part = view[:, 1:5]
        before = part + 0
        y.mul_(3)
        between = part + 0
        part.sub_(1)
        y[:, 0] = view[:, :6] + part.sum(1, keepdim=True)
        return before, between, part, view, y


def test_each_read_sees_all_writes_before_it_and_none_behind() -> None:
    graph_module = trace(Views(), (X,))
    for found, wanted in zip(graph_module(X), Views()(X), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    # A view whose memory was not written to since is read as it is, and not taken again.
    assert graph_module.code.count(".view(") == 3
