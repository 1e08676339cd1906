"""What a rule says of its operation beside labels: how its arguments are called, what it is linear in, what norm it is.

A `Call` is a node with its arguments by name, the same for a module (whose attributes are arguments) as for a function,
so that both share one answer. A rule's ``linear`` gives a `Linear` of it, its ``norm`` a `Norm` of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

from fxzip.contraction import Contraction


def rank_of(node: Any) -> int | None:
    """The number of axes of a node's value, as it was traced; None if that is not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def shape_of(node: Any) -> list[str] | None:
    """The shape of a node's value, as it was traced, its batch size a symbol; None if that is not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else None


def name_of(value: Any) -> str | None:
    """The qualified name of the parameter or buffer that a node reads; None for anything else."""
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


@dataclass(frozen=True, eq=False)
class Call:
    """A node as a call with named arguments.

    Attributes:
        node: The node.
        module: What it calls, at a call_module node.
        names: The arguments that can be given by place, in order, as the rule's signature calls them.
        arguments: The arguments by name, defaults and the module's attributes included; tensors are nodes, but for
            those that the module has.
        tensor: Gives the parameter or buffer of a qualified name.
    """

    node: fx.Node
    module: nn.Module | None
    names: tuple[str, ...]
    arguments: Mapping[str, Any]
    tensor: Callable[[str], Tensor]

    def parameter(self, name: str) -> str | None:
        """The qualified name of the parameter or buffer that an argument is; None where it is anything else."""
        if self.module is not None and isinstance(getattr(self.module, name, None), Tensor):
            return f"{self.node.target}.{name}"
        return name_of(self.arguments.get(name))

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer, by its qualified name."""
        return tuple(self.tensor(parameter).shape)

    def source(self, name: str) -> fx.Node | None:
        """The node that computes an argument from the network's inputs; None where no node does."""
        value = self.arguments.get(name)
        return value if isinstance(value, fx.Node) and value.op != "get_attr" else None

    def takes(self, name: str) -> bool:
        """Whether the call can have a parameter of that name, though it may have none."""
        return name in (self.names if self.module is None else self.module._parameters)


@dataclass(frozen=True, eq=False)
class Linear:
    """A call that is linear in its input and in a weight: y = Σ weight · x + bias.

    Attributes:
        input: The node of the input.
        weight: Qualified name of the weight.
        contraction: How the two are multiplied.
        bias: The argument that is the bias, or would be if it had one; None where it can have none.
    """

    input: fx.Node
    weight: str
    contraction: Contraction
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """A normalisation, whose argument ``weight`` then scales each channel, and ``bias``, if it takes one, shifts it.

    Attributes:
        axis: Where its channels lie.
        statistics: Whether it is a BatchNorm: its arguments ``running_mean`` and ``running_var`` are the averages of
            its input's mean and unbiased variance for each channel, and in eval mode it is a line of the input.
        several: Whether it gives other values behind the normalised one.
        over: Whether all channels of ``axis`` are divided by one number, the root of their mean square (``rms``), after
            their mean was subtracted (``layer``); None: each channel, or group, has a number of its own.
    """

    axis: int
    statistics: bool = False
    several: bool = False
    over: Literal["layer", "rms"] | None = None


@dataclass(frozen=True)
class Joint:
    """What an operation does to channels as vectors: with all vectors turned by one matrix its result is turned, too.

    Attributes:
        kind: ``move``: vectors are moved as they are, or averaged with others. ``reduce``: they are summed over some
            axes, which may be those of the channels. ``sum``: vectors are added. ``product``: it is linear in each
            operand. ``square``: each number is squared (and invariant once it is summed over all channels).
        only: The place of the only argument that it is linear in; None: in any.
        constant: Whether what is the same vector everywhere comes out as it came in (a mean, and no padding).
    """

    kind: Literal["move", "reduce", "sum", "product", "square"]
    only: int | None = None
    constant: bool = True


LinearRule = Callable[[Call], Linear | None]
NormRule = Callable[[Mapping[str, Any]], Norm | None]
IdleRule = Callable[[Mapping[str, Any]], bool]
JointRule = Callable[[Mapping[str, Any]], Joint | None]


def product(input: str, weight: str, equation: str, bias: str | None = None) -> LinearRule:
    """The ``linear`` of a rule whose operation is the product of its input with a weight.

    Args:
        input: The argument that is the input.
        weight: The argument that is the weight.
        equation: The product as `torch.einsum` has it: "i,oi->o" is that of `torch.nn.Linear`. Axes of the input
            without a letter come first, and are the result's.
        bias: The argument that is added to each channel of the result, if there is one.
    """
    left, _, output = equation.partition("->")
    letters = left.split(",")

    def linear(call: Call) -> Linear | None:
        name, source = call.parameter(weight), call.source(input)
        if name is None or source is None:
            return None
        contraction = Contraction.einsum(call.shape(name), letters[0], letters[1], output)
        own_bias = bias if bias is not None and call.takes(bias) else None
        return None if contraction is None else Linear(source, name, contraction, own_bias)

    return linear
