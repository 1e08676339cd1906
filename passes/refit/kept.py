"""BatchNorms that stay: what refit has folded into layers is taken out again, as norms that train.

Refit solves a layer together with the BatchNorm behind it, y = W x + b. With ``keep_norms`` a BatchNorm is put back
there that gives y again: its statistics are those of y - b on the calibration images, its scale is their deviation,
its shift their mean. In eval mode that is exact; in train mode it normalises by the batch, and its running statistics
follow, as in any network that is trained. BatchNorms that are written as functions in eval mode become modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from fxzip.data.calibration import Images
from fxzip.graphs import drop_dead_code, drop_unused, named_call, norm_of, static_value
from fxzip.passes.refit.layers import Layer, find_layer
from fxzip.passes.refit.slots import Uses, empty, slot
from fxzip.passes.split import Split
from fxzip.processes import Processes
from fxzip.rules.calls import rank_of

_MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True, eq=False)
class Kept:
    """A BatchNorm as it was before the fit.

    Attributes:
        node: It.
        owner: The module that it is, or that its statistics are of.
        made: A BatchNorm of its size and settings.
        layer: The layer that refit can fold it into; None where it stands alone.
        biased: Whether that layer has a bias of its own.
    """

    node: fx.Node
    owner: str
    made: nn.Module
    layer: Layer | None
    biased: bool


def find_norms(module: fx.GraphModule) -> list[Kept]:
    """The BatchNorms with running statistics of a graph that is to be refitted, in order."""
    uses, found = Uses(module), []
    layers = [layer for node in module.graph.nodes if (layer := find_layer(module, node, uses)) is not None]
    behind = {node: layer for layer in layers for node in layer.chain}
    for node in module.graph.nodes:
        made = _made(module, node)
        if made is not None:
            layer = behind.get(node)
            bias = None if layer is None or layer.bias is None else slot(module, layer.node, layer.bias)
            found.append(Kept(node, _owner(module, node), made, layer, bias is not None))
    return found


def _made(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A BatchNorm with a node's settings and values; None where the node is none."""
    norm, call = norm_of(module, node), named_call(module, node)
    mean = None if norm is None or not norm.statistics or norm.several else slot(module, node, "running_mean")
    kind = _MODULES.get(rank_of(node) or 0)
    if call is None or mean is None or kind is None:
        return None
    eps, momentum = float(call.arguments.get("eps", 1e-5)), call.arguments.get("momentum", 0.1)
    if call.module is None:
        momentum = momentum or 0.1  # in eval mode it says nothing, and may be 0
    made = kind(len(mean), eps=eps, momentum=momentum).to(mean)
    with torch.no_grad():
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            value = slot(module, node, name) if name in call.names or call.module is not None else None
            if value is not None:
                tensor.copy_(value)
    return made.eval()


def _owner(module: fx.GraphModule, node: fx.Node) -> str:
    call = named_call(module, node)
    if node.op == "call_module" or call is None:
        return str(node.target)
    source = call.parameter("running_mean")
    return node.name if source is None else source.rpartition(".")[0]


class Placed:
    """A BatchNorm that stands behind its layer again, does nothing, and watches what it gets until it is settled."""

    def __init__(self, made: nn.Module, bias: Tensor | None) -> None:
        self.made = made
        state, eps = made.state_dict(), made.eps
        neutral = {"running_mean": 0.0, "running_var": 1.0 - eps, "weight": 1.0, "bias": 0.0}  # type: ignore[operator]
        for name, value in neutral.items():
            state[name].fill_(value)
        self.size = len(state["weight"])
        if bias is not None:
            state["bias"].copy_(bias)
        self.offset = state["bias"].double().cpu().clone()
        self.count, self.sums = 0, torch.zeros(2, self.size, dtype=torch.float64)

    def watch(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Add what the BatchNorm gets: (batch, channels, ...)."""
        x = given[0].detach().double().transpose(0, 1).reshape(self.size, -1)
        self.count += x.shape[1]
        self.sums += torch.stack([x.sum(1), x.square().sum(1)]).cpu()

    def settle(self, processes: Processes) -> None:
        """Take the statistics of what was seen, and the scale and shift that give the same again."""
        own = [torch.tensor(self.count, dtype=torch.float64), self.sums] if self.count else None
        count, sums = processes.total("statistics of norms", own)
        mean, square = sums / count.clamp(min=1)
        var = (square - mean.square()).clamp(min=0)
        state = self.made.state_dict()
        state["running_mean"].copy_(mean)
        state["running_var"].copy_(var)
        # As it will be computed, with the values as they are kept.
        kept = {name: state[name].double().cpu() for name in ("running_mean", "running_var")}
        state["weight"].copy_((kept["running_var"] + self.made.eps).sqrt())
        state["bias"].copy_(kept["running_mean"] + self.offset)


def settle(parts: Split, placed: Iterable[Placed], images: Images) -> None:
    """Give BatchNorms that were put back the statistics of what they get, so that each gives what its layer gave."""
    watched = list(placed)
    with torch.no_grad(), ExitStack() as stack:
        for each in watched:
            stack.callback(each.made.register_forward_pre_hook(each.watch).remove)
        for args, kwargs in images.own:
            crossing = parts.trunk(*args, **kwargs)
            for head in parts.heads:
                head(*crossing)
    for each in watched:
        each.settle(images.processes)


def put_back(module: fx.GraphModule, kept: Sequence[Kept]) -> list[Placed]:
    """Make BatchNorms again of the nodes that were folded and hand on what they get, and modules of functions.

    Args:
        module: A graph whose layers were solved; `Layer.cut_out` comes after it.
        kept: What `find_norms` gave of it before.
    """
    found = []
    for each in kept:
        if norm_of(module, each.node) is not None:
            _as_module(module, each)
            continue
        bias = _taken_over(module, each)
        if bias is None or len(bias) == len(each.made.state_dict()["weight"]):
            found.append(Placed(each.made, bias))
            _become(module, each, each.node.all_input_nodes[0], each.made)
    return found


def norms_as_modules(module: fx.GraphModule) -> None:
    """Make modules of the BatchNorms of a graph that are functions, in eval mode for ever: so they train, too."""
    before = set(module.state_dict())
    functions = [node for node in module.graph.nodes if node.op != "call_module"]
    for node in functions:
        made = _made(module, node)
        if made is not None:
            _as_module(module, Kept(node, _owner(module, node), made, None, False))
    drop_dead_code(module)
    drop_unused(module, before)


def _taken_over(module: fx.GraphModule, kept: Kept) -> Tensor | None:
    """The bias that refit gave a layer, which its BatchNorm is to hold from now on; None where there is none."""
    layer, node = kept.layer, kept.node
    if node.target is torch.add:
        return cast(Tensor, static_value(module, node.args[1])).reshape(-1)
    if layer is None or kept.biased or layer.bias is None:
        return None
    bias = slot(module, layer.node, layer.bias)
    if bias is not None:
        empty(module, layer.node, layer.bias)
    return bias


def _as_module(module: fx.GraphModule, kept: Kept) -> None:
    """A BatchNorm that is a function, in eval mode for ever, as a module with its values as they are now."""
    call, made = named_call(module, kept.node), _made(module, kept.node)
    source = None if call is None else call.source("input")
    if kept.node.op != "call_module" and made is not None and source is not None:
        _become(module, kept, source, made)


def _become(module: fx.GraphModule, kept: Kept, source: fx.Node, made: nn.Module) -> None:
    """Let a node call a BatchNorm, under the name that its statistics had."""
    target, node = kept.owner, kept.node
    known = dict(module.named_modules()).get(target)
    if known is not None and any(known.children()):
        target = f"{target}.norm"  # its activation stands there, too
    module.add_submodule(target, made)
    node.op, node.target, node.args, node.kwargs = "call_module", target, (source,), {}
