"""The recalibrate pass: BatchNorm statistics reset on data, wherever a network keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxzip.data.bars import Shown
from fxzip.data.loops import device_of, evaluating, feed
from fxzip.errors import CalibrationError
from fxzip.graphs import attribute, is_within, named_call, norm_of
from fxzip.moments import is_noise
from fxzip.processes import ALONE, Processes
from fxzip.rules.registry import Entry, find_entry

_STATISTICS = ("running_mean", "running_var")


def recalibrate(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    progress: Shown = True,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    skip: Sequence[str] = (),
    processes: Processes = ALONE,
) -> int:
    """Reset the statistics of every BatchNorm in a module to those of a loader; returns how many were reset.

    The statistics are those of ``reset_running_stats()`` and a pass in train mode with ``momentum=None``
    (cumulative averaging; it is what the code of ZipIt!, arXiv 2305.03053, does): ``running_mean`` is the
    plain average over the batches of the batches' means, ``running_var`` that of the batches' *unbiased*
    variances. A smaller last batch thus counts as much as any other, and the variance between batches is left
    out. Channels that do not vary keep their ``running_var``, and a batch with one value for each channel is passed
    over. During the pass each BatchNorm normalises by the batch's own statistics, as in training, so that a
    layer sees what the reset layers before it give. The averages are kept in float64.

    It holds for BatchNorm modules and for BatchNorm functions in a GraphModule whose statistics are
    attributes. All else (dropout, drop-path) stays in eval mode. Layers that keep no statistics
    (``track_running_stats=False``), and layers that the pass never reaches, are left alone; without any
    BatchNorm the loader is not read. Statistics are written only when the pass has ended well: on failure the
    module is as it was.

    Args:
        module: Called as ``module(*args, **kwargs)`` on each batch; a network of several heads runs them all.
        loader: As for `fxzip.passes.observe.observe`.
        progress: Show a bar.
        device: Where inputs go; None: to where the module is.
        max_batches: Stop after so many batches.
        skip: Submodules whose BatchNorms are left alone.
        processes: Those that read a share of the batches each; the statistics are of all of them.

    Raises:
        CalibrationError: the loader is empty, a batch does not fit, or statistics are not finite (names the
        layer).
    """
    layers = {key: layer for key, layer in _find(module).items() if not is_within(layer.name, skip)}
    if not layers:
        return 0
    with processes.together("recalibrating"), evaluating(module), _TrainStatistics(layers.values()):
        feed(
            module,
            loader,
            progress=progress if processes.leads else False,
            description="recalibrating",
            device=device if device is not None else device_of(module),
            max_batches=max_batches,
            least=1 if processes.count == 1 else 0,
        )
    own = [torch.cat([layer.sums.flatten(), layer.sums.new_tensor([layer.batches])]) for layer in layers.values()]
    for layer, total in zip(layers.values(), processes.total("BatchNorm statistics", own), strict=True):
        layer.sums, layer.batches = total[:-1].reshape(2, -1), round(float(total[-1]))
    reset = [layer for layer in layers.values() if layer.batches]
    for layer in reset:
        layer.require_finite()
    for layer in reset:
        layer.write()
    return len(reset)


class _Layer:
    """One pair of running statistics and the sums from which they will be written."""

    def __init__(self, name: str, mean: Tensor, var: Tensor, counter: Tensor | None) -> None:
        self.name, self.mean, self.var, self.counter = name, mean, var, counter
        self.batches = 0
        # Metal has no float64.
        home = torch.device("cpu") if mean.device.type == "mps" else mean.device
        self.sums = torch.zeros(2, len(mean), dtype=torch.float64, device=home)

    def add(self, mean: Tensor, var: Tensor) -> None:
        self.sums += torch.stack([mean, var]).to(self.sums.device)
        self.batches += 1

    def require_finite(self) -> None:
        if not bool(torch.isfinite(self.sums).all()):
            raise CalibrationError(f"the inputs of BatchNorm {self.name!r} are not finite (NaN or infinite)")

    @torch.no_grad()
    def write(self) -> None:
        mean, var = self.sums / self.batches
        self.mean.copy_(mean)
        # Where nothing varies, what training left stands: dividing by nothing would make immense whatever comes later.
        self.var.copy_(torch.where(is_noise(var, mean), self.var.to(var), var))
        if self.counter is not None:
            self.counter.fill_(self.batches)


class _TrainStatistics(TorchFunctionMode):
    """While on, BatchNorms with known statistics run on the batch's own, which are added to their layer.

    Modules, traced functions and exported operators all come to a function whose rule says that it is a BatchNorm,
    so neither modes nor graphs need be changed and put back.
    """

    def __init__(self, layers: Iterable[_Layer]) -> None:
        super().__init__()
        self.layers = {id(layer.mean): layer for layer in layers}
        self._entries: dict[Callable[..., Any], Entry | None] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        entry = self._entry(func)
        given = {} if entry is None else entry.arguments(args, kwargs)
        layer = self.layers.get(id(given.get("running_mean")))
        norm = None if entry is None or entry.norm is None or layer is None else entry.norm(given)
        single = "input" in given and given["input"].numel() == given["input"].shape[1]  # one value has no variance
        if layer is None or norm is None or not norm.statistics or single:
            return func(*args, **kwargs)
        # Momentum 1 leaves the batch's mean and unbiased variance in the place of the running ones.
        mean, var = torch.zeros_like(layer.mean), torch.ones_like(layer.var)
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        out = F.batch_norm(given["input"], mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
        layer.add(mean, var)
        return (out, mean.new_empty(0), mean.new_empty(0)) if norm.several else out

    def _entry(self, func: Callable[..., Any]) -> Entry | None:
        """The rule of a function that normalises; looked up once."""
        if func not in self._entries:
            entry = find_entry(func)
            self._entries[func] = None if entry is None or entry.norm is None else entry
        return self._entries[func]


def _find(module: nn.Module) -> dict[int, _Layer]:
    """All BatchNorm statistics of a module, by the identity of the running mean: modules', then graphs'."""
    layers: dict[int, _Layer] = {}
    for name, submodule in module.named_modules():
        entry = find_entry(submodule)
        norm = None if entry is None or entry.norm is None else entry.norm(vars(submodule))
        if norm is not None and norm.statistics:
            mean, var, counter = (submodule._buffers.get(key) for key in (*_STATISTICS, "num_batches_tracked"))
            if mean is not None and var is not None:
                layers.setdefault(id(mean), _Layer(name, mean, var, counter))
    for name, submodule in module.named_modules():
        if isinstance(submodule, fx.GraphModule):
            for layer in _find_functions(name, submodule):
                layers.setdefault(id(layer.mean), layer)
    return layers


def _find_functions(prefix: str, module: fx.GraphModule) -> Iterable[_Layer]:
    """The layers of a graph's BatchNorm functions whose statistics are attributes."""
    for node in module.graph.nodes:
        norm, call = norm_of(module, node), named_call(module, node)
        if call is None or call.module is not None or norm is None or not norm.statistics:
            continue
        mean, var = (call.parameter(name) for name in _STATISTICS)
        if mean is not None and var is not None:
            owner = mean.rpartition(".")[0] or node.name
            name = f"{prefix}.{owner}" if prefix else owner
            yield _Layer(name, attribute(module, mean), attribute(module, var), None)
