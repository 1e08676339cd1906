"""Models that came through torch.export are merged as the models that they were made of."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxzip
from fxzip.passes.trace import trace
from tests.nets import Net, conv
from tests.oracles import call, difference, images, randomise

X = images(48, 6)


def in_place(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x.relu_()
    x += 1
    return m.head(F.relu(m.b(x)).mean((2, 3)))


def plain(m: Net, x: Tensor) -> Tensor:
    return m.head(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def network(function: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Net(function, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 3)), X, seed)


def exported(net: nn.Module) -> fx.GraphModule:
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (X[:4],), dynamic_shapes=({0: batch},), strict=False)
    return program.module(check_guards=False)


@pytest.mark.parametrize("function", [in_place, plain], ids=lambda f: f.__name__)
def test_a_merge_with_its_own_copy_is_exact_at_every_cut(function: object) -> None:
    """Writes in place (``relu_``, ``+= 1``) were once lost by the heads, and the merge was off by its own size."""
    net = network(function)
    graph = exported(net)
    prepared = fxzip.prepare(graph, exported(net), example_inputs=X, verify=False).observe([X], progress=False)
    assert len(prepared.cuts) > 4
    for cut in (0.0, None, *prepared.cuts):
        zipped = prepared.convert(cut=cut, refit=False, reset_batch_norm=False, verify=False, progress=False)
        for output in zipped(X):
            assert difference(call(net, X), output) < 1e-9, cut
    assert difference(call(net, X), call(graph, X)) < 1e-12  # the user's graph is as it was


@pytest.mark.parametrize("function", [in_place, plain], ids=lambda f: f.__name__)
def test_refit_knows_a_relu_of_aten(function: object) -> None:
    """Fits before a ReLU are one-sided; an exported graph's ReLU was once overlooked."""
    nets = [network(function, seed) for seed in (0, 1)]
    merged = fxzip.zip(*nets, [X], progress=False)
    again = fxzip.zip(*map(exported, nets), [X], progress=False)
    assert merged.report.refitted == again.report.refitted
    assert difference(merged(X), again(X)) < 1e-5


class Nested(nn.Module):
    """Inputs in dicts and lists, by place and by name, one of them not used; outputs nested too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, given: dict[str, Any], scale: float = 1.0, *, more: list[Tensor]) -> dict[str, Any]:
        y = F.relu(self.a(given["batch"]["image"])) + F.relu(self.b(given["list"][1])) * more[0]
        return {"out": self.c(y) * scale, "rest": [self.d(y), (self.c(y.square()),)]}


@pytest.fixture
def by_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first way to a graph fails."""

    def fails(*_: Any) -> fx.GraphModule:
        raise NotImplementedError("not today")

    monkeypatch.setattr(sys.modules["fxzip.passes.trace.trace"], "_by_recording", fails)


def nested_inputs(count: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    first, unread, second, more = (torch.rand(count, n, generator=generator).double() for n in (6, 6, 6, 1))
    return {"given": {"batch": {"image": first}, "list": [unread, second]}, "more": [more]}


@pytest.mark.usefixtures("by_export")
def test_inputs_and_outputs_in_dicts_and_lists_go_through_export() -> None:
    nets = [randomise(Nested().double(), nested_inputs(4, 9), seed) for seed in (0, 1)]
    graph = trace(nets[0], (), nested_inputs(4, 0))
    assert graph.meta["traced_by"] == "export"
    assert [node.target for node in graph.graph.find_nodes(op="placeholder")] == ["given", "more"]
    prepared = fxzip.prepare(*nets, example_inputs=nested_inputs(4, 1)).observe([nested_inputs(64, 2)], progress=False)
    inputs = nested_inputs(5, 3)
    for output, net in zip(prepared.convert(cut=0.0, progress=False)(**inputs), nets, strict=True):
        assert difference(net(**inputs), output) < 1e-12
    assert [space.size for space in prepared.spec.spaces] == [8]
    assert prepared.convert(progress=False)(**inputs)[0]["rest"][0].isfinite().all()


@pytest.mark.usefixtures("by_export")
def test_a_graph_of_the_second_way_takes_its_inputs_first() -> None:
    """torch.export's own has them after the parameters, and the cut before all layers has no room for them."""
    net = network(plain)
    zipped = fxzip.zip(net, network(plain, 1), [X], cut=0.0, progress=False)
    assert difference(call(net, X), zipped(X)[0]) < 1e-12
