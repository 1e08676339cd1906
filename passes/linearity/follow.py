"""Following channels through a graph: what each node makes of them, as the rule of its operation says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor, fx, nn

from fxzip.channels import ChannelSpec
from fxzip.contraction import Contraction
from fxzip.graphs import attribute, does_nothing, is_static, linear_of, named_call, norm_of
from fxzip.passes.refit.layers import find_layer
from fxzip.passes.refit.lines import line_of
from fxzip.passes.refit.slots import Uses, slot
from fxzip.rules import target_of
from fxzip.rules.calls import Joint, Linear, Norm
from fxzip.rules.jointly import moves
from fxzip.rules.registry import find_entry


class State(IntEnum):
    """What a value's channels are to those that were written."""

    PLAIN = 0
    """They are what was written."""
    NORMED = 1
    """They come from a norm, so that they are centred if it centres."""
    SCALED = 2
    """Each has been multiplied by a number of its own."""
    SHIFTED = 3
    """Each has been multiplied and shifted."""
    SQUARED = 4
    """They are squares."""


@dataclass(eq=False)
class Linearity:
    """What `find_linearity` finds; spaces by their numbers in the spec.

    Attributes:
        bent: For each space that is not linear the first reason.
        states: For each node the spaces in its value, and what their channels are.
        norms: The norms over all channels of a space.
        centring: For each space a norm that subtracts its mean.
        raw: For each space a node that reads channels as they were written.
    """

    bent: dict[int, str] = field(default_factory=dict)
    states: dict[fx.Node, dict[int, State]] = field(default_factory=dict)
    norms: dict[fx.Node, int] = field(default_factory=dict)
    centring: dict[int, fx.Node] = field(default_factory=dict)
    raw: dict[int, fx.Node] = field(default_factory=dict)


class Follower:
    """Visits nodes in order, and keeps for each what the channels of its value are."""

    def __init__(self, module: fx.GraphModule, spec: ChannelSpec) -> None:
        self.module, self.spec = module, spec
        self.found = Linearity()
        self._of_parameter: dict[str, dict[int, State]] = {}
        for number, space in enumerate(spec.spaces):
            for site in space.sites:
                self._of_parameter.setdefault(site.parameter, {})[number] = State.PLAIN
        by_identity: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            first = by_identity.setdefault(id(tensor), name)
            if first in self._of_parameter:
                self._of_parameter[name] = self._of_parameter[first]
        uses = Uses(module)
        layers = (find_layer(module, node, uses) for node in module.graph.nodes)
        self._chained = {node for layer in layers if layer is not None for node in layer.chain}

    def run(self) -> Linearity:
        """What is found at all nodes."""
        for node in self.module.graph.nodes:
            self.visit(node)
        return self.found

    def visit(self, node: fx.Node) -> None:
        """What a node does to the spaces that it touches."""
        if node.op == "get_attr":
            self.found.states[node] = dict(self._of_parameter.get(str(node.target), {}))
        elif node.op == "output":
            self._bend(self._inputs(node), f"{node} gives it away")
        elif node.op != "placeholder" and self._has_channels(node):
            self.found.states[node] = self._written(node)
            self._result(node)

    def _has_channels(self, node: fx.Node) -> bool:
        return node.name in self.spec.layout.factors or node.name in self.spec.layout.bundles

    def _written(self, node: fx.Node) -> dict[int, State]:
        """The spaces in a node's value, as if it wrote them; those of its inputs where it gives several tensors."""
        factors = self.spec.layout.factors.get(node.name)
        if factors is None:
            return dict(self._inputs(node))
        owners: set[int] = set()
        for factor in factors:
            owners.update(self.spec.layout.space[factor[factor >= 0]].unique().tolist())
        owners.discard(-1)
        if node.name not in self.spec.layout.bundles:
            whole = {space.name for space, _, _ in self.spec.locate(node.name)}
            self._bend((n for n in owners if self.spec.spaces[n].name not in whole), f"{node} has a part of it")
        return dict.fromkeys(owners, State.PLAIN)

    def _inputs(self, node: fx.Node) -> dict[int, State]:
        """The spaces in what a node reads, its module's parameters included; the furthest state of each."""
        found: dict[int, State] = {}
        for operand in self._operands(node):
            for number, state in operand.items():
                found[number] = max(state, found.get(number, state))
        return found

    def _operands(self, node: fx.Node) -> Iterator[dict[int, State]]:
        """The spaces in each operand; indices and sizes are none."""
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if source in self.found.states or (isinstance(value, Tensor) and value.is_floating_point()):
                yield self.found.states.get(source, {})
        if node.op == "call_module":
            for name, _ in self.module.get_submodule(str(node.target)).named_parameters():
                yield self._of_parameter.get(f"{node.target}.{name}", {})

    def _bend(self, numbers: Iterable[int], why: str) -> None:
        for number in numbers:
            self.found.bent.setdefault(number, why)

    def _result(self, node: fx.Node) -> None:
        if node in self._chained:
            return
        norm, layer = norm_of(self.module, node), linear_of(self.module, node)
        if norm is not None and norm.over is not None:
            self._norm(node, norm)
        elif layer is not None:
            self._layer(node, layer)
        elif (joint := self._joint(node)) is not None:
            self._jointly(node, joint)
        else:
            touched = {**self._inputs(node), **self.found.states[node]}
            self._bend(touched, f"{node} acts on each channel, or on several, in a way that is not linear")

    def _joint(self, node: fx.Node) -> Joint | None:
        if does_nothing(self.module, node):
            return moves({})
        entry = find_entry(target_of(self.module, node))
        return None if entry is None or entry.joint is None else entry.joint(entry.arguments(node.args, node.kwargs))

    # ---- norms

    def _norm(self, node: fx.Node, norm: Norm) -> None:
        call = named_call(self.module, node)
        source = None if call is None else call.source("input")
        before = {} if source is None else self.found.states.get(source, {})
        if call is None or source is None or len(before) != 1 or not self._fills(source, norm):
            self._bend({**self._inputs(node), **self.found.states[node]}, f"{node} normalises more or less than it")
            return
        ((number, state),) = before.items()
        if state > State.NORMED:
            self._bend(before, f"{node} reads channels that are scaled")
        if norm.over == "layer":
            self.found.centring[number] = node
        elif state == State.PLAIN:
            self.found.raw.setdefault(number, node)
        self.found.norms[node] = number
        scaled, shifted = (slot(self.module, node, name) is not None for name in ("weight", "bias"))
        self.found.states[node][number] = State.SHIFTED if shifted else State.SCALED if scaled else State.NORMED

    def _fills(self, source: fx.Node, norm: Norm) -> bool:
        """Whether a space's channels are all that lies along a value's last axis, each once for a mean to be theirs."""
        (number,) = self.found.states[source]
        factors = [f for f in self.spec.layout.factors.get(source.name, ()) if f.dim() and f.shape[-1] > 1]
        if len(factors) != 1 or self._axes(source, number) != {-1}:
            return False
        whole = bool((self.spec.layout.space[factors[0].clamp(min=0)] == number).logical_and(factors[0] >= 0).all())
        return whole and (norm.over == "rms" or factors[0].shape[-1] == self.spec.spaces[number].size)

    # ---- layers

    def _layer(self, node: fx.Node, layer: Linear) -> None:
        """What is read must be summed over, what is written must be the outputs."""
        before, written = self.found.states.get(layer.input, {}), self.found.states[node]
        contraction = layer.contraction
        if contraction.count > 1:
            self._bend({**before, **written}, f"{node} reads channels in groups")
            return
        known = self._of_parameter.get(layer.weight, {})
        self._bend(set(known) - set(before) - set(written), f"{node} reads constants in its place")
        for number, state in before.items():
            if not self._axes(layer.input, number) <= set(contraction.mixed):
                self._bend({number}, f"{node} lets it pass")
            elif state in (State.SCALED, State.SHIFTED) and not self._absorbs(layer, state):
                self._bend({number}, f"{node} cannot take the scale of what it reads")
            elif state == State.SQUARED:
                self._bend({number}, f"{node} reads squares")
            elif state == State.PLAIN:
                self.found.raw.setdefault(number, node)
        for number in written:
            if not self._axes(node, number) <= set(contraction.channels):
                self._bend({number}, f"{node} lets it pass")

    def _axes(self, node: fx.Node, number: int) -> set[int]:
        """The axes of a node's value, from the end, along which a space's channels lie; {0} if that is not known."""
        found: set[int] = set()
        layout = self.spec.layout
        for factor in layout.factors.get(node.name, ()):
            labels = factor.clamp(min=0)
            here = (layout.space[labels] == number) & (factor >= 0)
            channel = layout.channel[labels].where(here, -1)
            if bool(here.any()):
                differs = (channel != channel.narrow(axis, 0, 1) for axis in range(factor.dim()))
                found.update(axis - factor.dim() for axis, other in enumerate(differs) if bool(other.any()))
        return found or {0}

    def _absorbs(self, layer: Linear, state: State) -> bool:
        """Whether a layer can have a scale, and a shift, of its input in its weight and its bias."""
        learnt = isinstance(attribute(self.module, layer.weight), nn.Parameter)
        return learnt and not _padded(layer.contraction) and (state == State.SCALED or layer.bias is not None)

    # ---- everything else

    def _jointly(self, node: fx.Node, joint: Joint) -> None:
        """By the kind of what an operation does to vectors of channels."""
        before, after = self._inputs(node), self.found.states[node]
        self._bend(set(after) - set(before), f"{node} makes it of something else")
        for number, state in before.items():
            new = self._turned(node, joint, number, state)
            if new is None:
                self._bend({number}, f"{node} is not linear in it")
            elif number in after:
                after[number] = new

    def _turned(self, node: fx.Node, joint: Joint, number: int, state: State) -> State | None:
        """What a space's channels are behind a node; None where they are bent."""
        kept = number in self.found.states[node]
        if joint.kind == "square":
            self.found.raw.setdefault(number, node)
            return State.SQUARED if state <= State.NORMED else None
        if state == State.SQUARED:
            return State.PLAIN if joint.kind == "reduce" and not kept else None
        if not kept:  # what a move leaves out is not seen behind it
            return state if joint.kind == "move" else None
        if joint.kind in ("sum", "product"):
            return self._combined(node, joint, number, state)
        operands = list(self._operands(node))
        if state > State.NORMED:  # the scale must be the same wherever the result is read
            return state if joint.constant and len(operands) == 1 else None
        return state if len(operands) == 1 else State.PLAIN if all(operands) else None

    def _combined(self, node: fx.Node, joint: Joint, number: int, state: State) -> State | None:
        """What a space's channels are behind a sum or a product."""
        carrying = [source for source in node.all_input_nodes if number in self.found.states.get(source, {})]
        computed = [source for source in carrying if not is_static(source)]
        line = line_of(self.module, node, computed[0]) if len(computed) == 1 else None
        if line is not None:
            same = all(map(self._axes(node, number).issuperset, map(_varying, line)))  # wherever the result is read
            if joint.kind == "sum" and state > State.NORMED:
                return State.SHIFTED if same else None
            if joint.kind == "product" and len(carrying) > 1:
                if not same:
                    return None
                if state == State.PLAIN:
                    self.found.raw.setdefault(number, node)
                return max(state, State.SCALED)
            if joint.kind == "product" and len(node.all_input_nodes) == 1:
                return state
        if state > State.NORMED:
            return None
        if joint.kind == "sum":
            return State.PLAIN if len(carrying) == len(node.args[:2]) + ("other" in node.kwargs) else None
        alone = len(carrying) == 1 and (joint.only is None or _argument(node, joint.only) is carrying[0])
        return state if alone else None


def _varying(tensor: Tensor) -> set[int]:
    """The axes of a tensor, from the end, that are longer than 1."""
    return {axis - tensor.dim() for axis, size in enumerate(tensor.shape) if size > 1}


def _argument(node: fx.Node, place: int) -> Any:
    """The argument at a place, as PyTorch's attention and quotients call them where they are named."""
    if place < len(node.args):
        return node.args[place]
    return node.kwargs.get("value" if place else "input")


def _padded(contraction: Contraction) -> bool:
    """Whether a convolution sees anything but its input."""
    window = contraction.window
    return window is not None and (
        any(part for pair in window.padding for part in pair) or any(step > 1 for step in window.spacing)
    )
