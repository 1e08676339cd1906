"""BatchNorm statistics against train mode in float64, for modules and for functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxzip.errors import CalibrationError
from fxzip.passes.recalibrate import recalibrate


class Modules(nn.Module):
    """Trunk and two heads, BatchNorm in each, and dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.BatchNorm1d(45))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.trunk(x)
        return [head(x) for head in self.heads]


@pytest.fixture
def loader() -> list[tuple[Tensor, int]]:
    return [(3 + 2 * torch.randn(size, 3, 7, 7), 0) for size in (8, 8, 5)]


def randomise(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1.0)
    return module


def plain_pass(module: nn.Module, loader: list[Any]) -> dict[str, Tensor]:
    """The statistics of a plain pass in float64 over the same data, only BatchNorm in train mode."""
    module = copy.deepcopy(module).double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for images, _ in loader:
            module(images.double())
    return module.state_dict()


def assert_states(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", [True, False])
def test_equals_a_plain_pass_in_float64(loader: list[Any], mode: bool) -> None:
    module = randomise(Modules()).train(mode)
    module.trunk[0].train(not mode)
    modes = [m.training for m in module.modules()]
    expected = plain_pass(module, loader)
    assert recalibrate(module, loader, progress=False) == 5
    assert_states(module.state_dict(), expected)
    assert module.trunk[1].num_batches_tracked == 3
    assert [m.training for m in module.modules()] == modes
    assert module.heads[0][1].momentum == 0.3


def test_float64_is_exact_and_many_batches_do_not_stall(loader: list[Any]) -> None:
    module = randomise(Modules()).double()
    images = [(batch.double() + k, 0) for k in range(20) for batch, _ in loader]
    expected = plain_pass(module, images)
    recalibrate(module, images, progress=False)
    assert_states(module.state_dict(), expected, 1e-12)


def test_the_last_small_batch_counts_as_any_other() -> None:
    module = nn.BatchNorm1d(1)
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]])]
    recalibrate(module, batches, progress=False)
    assert module.running_mean.item() == pytest.approx((1 + 4) / 2)
    assert module.running_var.item() == pytest.approx((2 + 1) / 2)


class Functions(nn.Module):
    """The same network in functions, as tracing leaves it."""

    def __init__(self, source: Modules, norm: Callable[..., Tensor]) -> None:
        super().__init__()
        self.source = source
        self.norm = norm

    def bn(self, x: Tensor, layer: nn.modules.batchnorm._BatchNorm) -> Tensor:
        return self.norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)

    def forward(self, x: Tensor) -> list[Tensor]:
        conv, bn, relu, _ = self.source.trunk
        x = relu(self.bn(conv(x), bn))
        outs = []
        for conv, bn, flatten, last in self.source.heads:
            outs.append(self.bn(flatten(self.bn(conv(x), bn)), last))
        return outs


def positional(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.1, eps)


def keywords(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, running_mean=mean, running_var=var, weight=weight, bias=bias, training=False, eps=eps)


def builtin(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.1, eps, True)


def aten(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.batch_norm.default(x, weight, bias, mean, var, False, 0.1, eps, True)


def native(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.native_batch_norm.default(x, weight, bias, mean, var, False, 0.1, eps)[0]


def legit(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, 0.1, eps)[0]


@pytest.mark.parametrize("norm", [positional, keywords, builtin, aten, native, legit])
def test_functions_with_statistics_as_attributes(loader: list[Any], norm: Callable[..., Tensor]) -> None:
    source = randomise(Modules())
    expected = plain_pass(source, loader)
    graph = fx.symbolic_trace(Functions(source, norm).eval())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.modules())
    holder = nn.ModuleDict({"trunk": graph})
    holder.forward = lambda x: graph(x)  # type: ignore[method-assign]
    code = graph.code
    assert recalibrate(holder, loader, progress=False) == 5
    assert graph.code == code
    found = {name.removeprefix("trunk.source."): value for name, value in holder.state_dict().items()}
    assert_states(found, {name: expected[name] for name in found})


def test_exported_program(loader: list[Any]) -> None:
    source = randomise(Modules()).eval()
    expected = plain_pass(source, loader)
    batch = torch.export.Dim("batch", min=2, max=64)
    graph = torch.export.export(source, (loader[0][0],), dynamic_shapes=({0: batch},)).module()
    assert recalibrate(graph, loader, progress=False) == 5
    names = {name: value for name, value in graph.state_dict().items() if "running" in name}
    assert len(names) == 10
    assert_states(names, {name: expected[name] for name in names})


def test_bfloat16(loader: list[Any]) -> None:
    module = randomise(Modules())
    images = [(batch.bfloat16(), 0) for batch, _ in loader] * 100  # 1/300 of an update is lost in bfloat16
    half = copy.deepcopy(module).bfloat16()
    recalibrate(half, images, progress=False)
    expected = plain_pass(half, images)
    for name, value in half.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value.double(), expected[name], rtol=0.03, atol=0.03)


def forbidden() -> Iterator[Any]:
    pytest.fail("the loader was read")
    yield


def test_nothing_to_do_reads_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False))
    module.append(nn.InstanceNorm2d(4, track_running_stats=True))
    assert recalibrate(module, forbidden(), progress=False) == 0
    assert recalibrate(fx.symbolic_trace(module), forbidden(), progress=False) == 0


def test_layers_not_reached_are_left_alone(loader: list[Any]) -> None:
    module = randomise(Modules())
    module.unused = nn.BatchNorm2d(3)
    module.unused.running_mean.fill_(7)
    assert recalibrate(module, loader, progress=False) == 5
    assert module.unused.running_mean.unique().tolist() == [7]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (torch.ones(2, 4, 7, 7), r"batch 2 of float32\[2, 4, 7, 7\] does not fit.*3 channels"),
        (torch.full((2, 3, 7, 7), float("nan")), "'trunk.1' are not finite"),
        ("text", "batch 2: "),
    ],
)
def test_failure_changes_nothing(loader: list[Any], last: Any, message: str) -> None:
    module = randomise(Modules())
    module.heads[1].eval()
    modes = [m.training for m in module.modules()]
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CalibrationError, match=message):
        recalibrate(module, [*loader[:2], last], progress=False)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(CalibrationError, match="no batches"):
        recalibrate(module, [], progress=False)


def test_what_does_not_vary_keeps_its_variance() -> None:
    for dtype in (torch.float32, torch.float64):
        norm = nn.BatchNorm2d(2).to(dtype).eval()
        x = torch.randn(4, 2, 3, 3, dtype=dtype)
        x[:, 1] = 0.3
        assert recalibrate(norm, [x], progress=False) == 1
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var[0], x[:, 0].var())
        assert norm.running_var[1] == 1
        assert recalibrate(norm, [x[:1, :, :1, :1]], progress=False) == 0  # one value has no variance
        assert norm.running_var[1] == 1
