"""The joint graph and the observing pass, on hand-aligned tiny networks."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxzip.channels import MergePoint
from fxzip.errors import CalibrationError
from fxzip.moments import Moments
from fxzip.observer import Observer
from fxzip.passes.align import Alignment
from fxzip.passes.observe import insert_observers, observe


class Net(nn.Module):
    """A stem, a residual block with an in-place ReLU, and a head of some classes."""

    def __init__(self, classes: int, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.conv(self.drop(x)) * self.scale
        x = self.act(x + y)
        return self.fc(self.last(x).mean((2, 3)))


def align(*modules: nn.Module) -> Alignment:
    """All nodes but the output are shared, in order."""
    traced = tuple(fx.symbolic_trace(module) for module in modules)
    names = [[node.name for node in module.graph.nodes if node.op != "output"] for module in traced]
    return Alignment(traced, tuple(zip(*names, strict=True)))


def point(node: str, n: int) -> MergePoint:
    return MergePoint(node, (1,), torch.arange(n)[:, None])


@pytest.fixture
def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(4), Net(7)


@pytest.fixture
def loader() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size)) for size in (4, 4, 3)]


POINTS = {
    "stem": [point("conv", 6)],
    "stage.1": [point("act", 6), point("act_1", 6)],
    "last": [point("last", 8)],
}


class Record(fx.Interpreter):
    """Keeps each node's value as it is when the node has run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n.name] = result.clone() if isinstance(result, Tensor) else result
        return result


@torch.no_grad()
def expected(nets: tuple[Net, ...], loader: list[Any], node: str) -> np.ndarray:
    """Samples × channels of all models at one node, by running each traced network alone, in float64."""
    batches = []
    for images, *_ in loader:
        columns = []
        for net in nets:
            record = Record(fx.symbolic_trace(copy.deepcopy(net).double().eval()))
            record.run(images.double())
            columns.append(record.seen[node])
        batches.append(torch.cat(columns, 1).movedim(1, -1).flatten(0, -2))
    return torch.cat(batches).numpy()


def assert_moments(found: Moments, samples: np.ndarray) -> None:
    centred = samples - samples.mean(0)
    assert found.count == len(samples)
    np.testing.assert_allclose(found.mean, samples.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.scatter, centred.T @ centred, rtol=1e-4, atol=1e-3)


def test_moments_are_those_of_separate_runs(nets: tuple[Net, Net], loader: list[Any]) -> None:
    found = observe(align(*nets), POINTS, loader, progress=False)
    assert list(found) == list(POINTS)
    assert_moments(found["stem"], expected(nets, loader, "conv"))
    assert_moments(found["last"], expected(nets, loader, "last"))
    pooled = np.concatenate([expected(nets, loader, node) for node in ("act", "act_1")])
    assert_moments(found["stage.1"], pooled)


def test_three_models_and_batches_of_each_kind(nets: tuple[Net, Net], loader: list[Any]) -> None:
    images = [batch[0] for batch in loader]
    kinds = [[images[0]], (images[1], 1), {"x": images[2]}]
    three = (*nets, Net(2))
    found = observe(align(*three), {"last": [point("last", 8)]}, kinds, progress=False)
    assert_moments(found["last"], expected(three, loader, "last"))


def test_joint_graph_shares_parameters_and_ends_at_the_last_point(nets: tuple[Net, Net]) -> None:
    alignment = align(*nets)
    joint = insert_observers(alignment, {"stem": [point("conv", 6)]})
    for number, module in enumerate(alignment.modules):
        assert joint.get_submodule(f"model_{number}.stem").weight is module.stem.weight
    targets = [str(node.target) for node in joint.graph.nodes]
    assert not any("last" in target or "fc" in target or "scale" in target for target in targets)
    assert [node.target for node in joint.graph.nodes if node.op == "placeholder"] == ["x"]
    observers = [module.name for module in joint.modules() if isinstance(module, Observer)]
    assert observers == ["stem"]
    joint.graph.lint()


def test_dead_branches_are_not_run(nets: tuple[Net, Net]) -> None:
    joint = insert_observers(align(*nets), {"skip": [point("act_1", 6)]})
    assert len([node for node in joint.graph.nodes if node.op == "call_module"]) == 2 * 6 + 1
    joint = insert_observers(align(*nets), {"norm": [point("norm", 6)]})
    assert len([node for node in joint.graph.nodes if node.op == "call_module"]) == 2 * 2 + 1


def test_activations_are_freed_as_the_graph_runs(nets: tuple[Net, Net]) -> None:
    joint = insert_observers(align(*nets), POINTS)
    code = joint.code
    for node in joint.graph.nodes:
        if node.op not in ("placeholder", "output") and "observer" not in str(node.target):
            assert re.search(rf"\b{node.name} = .*None", code), f"{node.name} is kept to the end:\n{code}"


def test_observed_before_it_is_overwritten(nets: tuple[Net, Net], loader: list[Any]) -> None:
    """``add`` is overwritten by the in-place ReLU after it: half of it is still negative when observed."""
    found = observe(align(*nets), {"add": [point("add", 6)]}, loader, progress=False)
    samples = expected(nets, loader, "add")
    assert (samples < 0).any()
    assert_moments(found["add"], samples)


class Writer(nn.Module):
    """Writes to its input, and makes an effect whose result nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        y = self.conv(x)
        y.add_(1.0)
        return y.relu()


def test_writes_reach_neither_the_other_model_nor_the_batch() -> None:
    torch.manual_seed(3)
    nets = (Writer(), Writer())
    images = torch.randn(4, 3, 5, 5)
    before = images.clone()
    found = observe(align(*nets), {"out": [point("relu", 5)]}, [images], progress=False)
    assert torch.equal(images, before)
    outputs = torch.cat([net(images.clone()) for net in nets], 1)
    np.testing.assert_allclose(found["out"].mean, outputs.mean((0, 2, 3)).detach(), atol=1e-5)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def failing(loader: list[Any]) -> Iterator[Any]:
    yield loader[0]
    raise KeyError("a broken dataset")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(nets: tuple[Net, Net], loader: list[Any], fails: bool) -> None:
    alignment = align(*nets)
    alignment.modules[0].train()
    alignment.modules[1].eval()
    alignment.modules[1].drop.train()
    modes = [[m.training for m in module.modules()] for module in alignment.modules]
    states = [state(module) for module in alignment.modules]
    threads = set(threading.enumerate())
    if fails:
        with pytest.raises(KeyError, match="broken"):
            observe(alignment, POINTS, failing(loader))
    else:
        observe(alignment, POINTS, loader)
    bars = [thread for thread in set(threading.enumerate()) - threads if type(thread).__module__.startswith("rich")]
    for bar in bars:  # its refresh thread was told to end, which takes a moment on a busy machine
        bar.join(timeout=10)
    assert not any(bar.is_alive() for bar in bars)
    assert [[m.training for m in module.modules()] for module in alignment.modules] == modes
    for module, before in zip(alignment.modules, states, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.is_grad_enabled()


def test_progress_bar(nets: tuple[Net, Net], loader: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    observe(align(*nets), POINTS, loader, progress=False)
    quiet = capsys.readouterr()
    assert not quiet.out
    assert not quiet.err
    observe(align(*nets), POINTS, iter(loader), progress=True)  # no length, no ETA, no failure
    assert not capsys.readouterr().out


def test_max_batches(nets: tuple[Net, Net], loader: list[Any]) -> None:
    found = observe(align(*nets), POINTS, loader, progress=False, max_batches=2)
    assert found["last"].count == 8 * 64


@pytest.mark.parametrize("empty", [[], iter(())])
def test_empty_loader(nets: tuple[Net, Net], empty: Any) -> None:
    with pytest.raises(CalibrationError, match="no batches"):
        observe(align(*nets), POINTS, empty, progress=False)


def test_bad_batches(nets: tuple[Net, Net], loader: list[Any]) -> None:
    alignment = align(*nets)

    def fails(batches: Any, match: str) -> None:
        with pytest.raises(CalibrationError, match=match):
            observe(alignment, POINTS, batches, progress=False)

    fails(7, "must be iterable, int is not")
    fails([loader[0], "cat.png"], "batch 1: .*str")
    fails([loader[0], torch.ones(2, 1, 8, 8)], r"batch 1: float32\[2, 1, 8, 8\] does not fit.*3 channels")
    fails([torch.ones(2, 3, 8, 8, dtype=torch.int64)], r"batch 0: int64\[2, 3, 8, 8\] does not fit")
    fails([{"pixels": torch.ones(2, 3, 8, 8)}], "pixels")


def test_input_without_a_batch_axis() -> None:
    """Without BatchNorm, conv takes C × H × W; axis 1 is then the height, here as long as the channels."""
    alignment = align(Net(4, norm=False), Net(4, norm=False))
    alignment.modules[0].graph.find_nodes(op="placeholder")[0].meta["val"] = torch.empty(2, 3, 6, 6, device="meta")
    with pytest.raises(CalibrationError, match=r"'x' has 4 axes, as in \[2, 3, 6, 6\].*float32\[3, 6, 6\]"):
        observe(alignment, {"stem": [point("conv", 6)]}, [torch.ones(3, 6, 6)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(nets: tuple[Net, Net], loader: list[Any], value: float) -> None:
    broken = loader[2][0].clone()
    broken[1, 2, 3, 4] = value
    with pytest.raises(CalibrationError, match=r"batch 2: .*'conv'.*not finite"):
        observe(align(*nets), {"stem": [point("conv", 6)]}, [*loader[:2], broken], progress=False)


def test_points_at_unshared_nodes(nets: tuple[Net, Net]) -> None:
    with pytest.raises(ValueError, match="do not share: nowhere"):
        insert_observers(align(*nets), {"a": [point("nowhere", 6)]})
