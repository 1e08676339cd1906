"""The rules of operations: what each does to labels, and through the sites that it declares to weights.

A rule is a small function ``rule(ctx, *args, **kwargs)`` that gets the operation's own arguments, tensors as
`Labelled`, and returns what the analysis knows of the result. It is registered for a module class, for a
function, or for the name that functions, methods and ATen operators of PyTorch share (``"softmax"``).

To add your own::

    @fxzip.register_rule(MyScale)                     # a module class, a function, or a torch.Tensor method
    def my_scale(ctx, module, x):
        return ctx.elementwise(x, ctx.per_channel("scale", axis=1, like=x))

The rule says what the operation does to channels: which come out where, and which meet and so are one. What that means
for weights follows: ``scale`` above lies along the channels of axis 1, so it is permuted and merged with them.

- Each element by itself, with one operand or several that broadcast: ``ctx.elementwise(x, y)``.
- A vector of a module along an axis: ``ctx.per_channel("scale", axis=1, like=x)``.
- A function that does not depend on the order along an axis (a sum, a norm): ``ctx.reduce(x, axis)``.
- A product with a parameter: take the labels of its axes by ``ctx.graph.axis(name, axis, size, role)``, with the role
  ``contract`` where it meets the input (``ctx.graph.unite``), and ``produce`` where new channels begin.
- What the rule does not cover: ``raise Unsupported("why")``.

Beside labels a rule says at its registration what else fxzip is to know (see `register_rule`): which weight the
operation is linear in, so that refit can solve for it and a cut before it needs no gather; whether it is a norm. These
find the operation's arguments by the names that the rule's signature gives them, so it has the operation's own names::

    @fxzip.register_rule(torch.ops.mine.dense.default, kind="layer", linear=product("x", "weight", "i,io->o"))
    def dense(ctx, x, weight):
        return matmul(ctx, x, weight)

Only own operations need rules: modules are looked into down to those of torch.nn. An operation without a rule, or whose
rule gives up, is probed (`fxzip.rules.probe`): run on random numbers with its channels in other orders. That finds
functions of each element, of the pixels of a channel, symmetric ones, and plain contractions; the spec lists what was
found. A rule is needed where channels lie in two axes at once (heads), or in blocks. What neither explains is kept in
place, with a warning that names the node. Test a rule by the oracle: ``fxzip.analyse(model, x).permute(model)`` must
compute what ``model`` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import Tensor, fx, nn

from fxzip.channels import Statistic
from fxzip.errors import OptionError
from fxzip.labelling.folding import reduce
from fxzip.labelling.labels import LabelGraph, Labelled
from fxzip.labelling.meeting import meet
from fxzip.rules.calls import IdleRule, JointRule, LinearRule, NormRule
from fxzip.rules.keys import key_of

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
Kind = Literal["layer", "passive", "pointwise"]


@dataclass(frozen=True, eq=False)
class Entry:
    """A rule as it was registered for a target; the attributes are what `register_rule` takes."""

    rule: Rule
    kind: Kind | None = None
    linear: LinearRule | None = None
    norm: NormRule | None = None
    idle: IdleRule | None = None
    joint: JointRule | None = None
    fresh: bool = False
    of_module: bool = False
    uniform: bool = False

    @cached_property
    def _signature(self) -> inspect.Signature:
        signature = inspect.signature(self.rule)
        own = list(signature.parameters.values())[2 if self.of_module else 1 :]
        return signature.replace(parameters=own)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The operation's arguments that can be given by place, as the rule's signature calls them."""
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(name for name, found in self._signature.parameters.items() if found.kind in by_place)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, defaults included; empty where the rule's signature does not take them."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:
            return {}
        bound.apply_defaults()
        return bound.arguments


_RULES: dict[object, Entry] = {}


class Unsupported(Exception):
    """Raised by a rule that does not cover the arguments it got: what it touches is frozen."""


@dataclass(eq=False)
class RuleContext:
    """What a rule can use.

    Attributes:
        graph: The labels found so far.
        node: The node of the traced graph.
        outputs: The node's value with fake tensors at batch 1.
        module: The module, at a call_module node.
    """

    graph: LabelGraph
    node: fx.Node
    outputs: Any
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, batch 1."""
        return tuple(self.outputs.shape)

    def own(self, name: str) -> Labelled | None:
        """The module's parameter or buffer of that name; None if it has none."""
        tensor = getattr(self.module, name, None)
        if tensor is None:
            return None
        return Labelled(tuple(tensor.shape), parameter=f"{self.node.target}.{name}")

    def elementwise(self, *values: Any) -> Labelled:
        """The result of an elementwise operation on values (with broadcasting)."""
        known = [as_labelled(v) for v in values if isinstance(v, (Labelled, Tensor))]
        result = self.graph.opened(known[0])
        for other in known[1:]:
            result = meet(self.graph, self.name, result, other)
        return Labelled(result.shape, result.factors, uniform=result.uniform)

    def per_channel(self, parameter: Labelled | str | None, axis: int, like: Labelled) -> Labelled | None:
        """A parameter vector, laid along an axis of a value."""
        if isinstance(parameter, str):
            parameter = self.own(parameter)
        if parameter is None:
            return None
        parameter = self.graph.opened(parameter)
        rank = len(like.shape)
        size = [1] * (axis % rank) + list(parameter.shape) + [1] * (rank - len(parameter.shape) - axis % rank)
        return Labelled(tuple(size), tuple(f.reshape(_spread(f, axis % rank, rank)) for f in parameter.factors))

    def statistic(self, parameter: Labelled | None, which: Statistic) -> Labelled | None:
        """A buffer as the running mean or variance of a norm: no weight, and averaged as such; returns it."""
        if isinstance(parameter, Labelled) and parameter.parameter is not None:
            self.graph.statistic(parameter.parameter, which)
        return parameter

    def reduce(self, value: Labelled, axes: Any = None, keepdim: bool = False) -> Labelled:
        """The result of a symmetric reduction over axes (all of them for None)."""
        rank = len(value.shape)
        axes = range(rank) if axes is None or axes == () else [axes] if isinstance(axes, int) else axes
        return reduce(self.graph, self.name, value, list(axes), keepdim)

    def use(self, value: Any) -> Any:
        """All channels of a value are treated alike by this node; returns the value."""
        if isinstance(value, Labelled):
            for factor in value.factors:
                self.graph.use(self.name, factor)
        return value

    def changed(self, value: Any) -> Any:
        """The value as this node's own: its channels were treated alike, and are no longer what they were."""
        if not isinstance(value, Labelled):
            return value
        self.use(value)
        return replace(value, versions=(self.name,) * len(value.factors))

    def freeze(self, value: Any, why: str) -> None:
        """Keep in place all channels that a value carries."""
        if isinstance(value, Labelled):
            for factor in self.graph.opened(value).factors:
                self.graph.freeze(factor, why)

    def positional(self) -> Any:
        """The result, with no channels in it."""
        return mapped(self.outputs, lambda v: Labelled(tuple(v.shape)) if isinstance(v, Tensor) else v)


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A nested value with a function applied to its leaves."""
    return fx.node.map_aggregate(value, function)


def _spread(factor: Tensor, axis: int, rank: int) -> list[int]:
    return [1] * axis + list(factor.shape) + [1] * (rank - factor.dim() - axis)


def as_labelled(value: Labelled | Tensor) -> Labelled:
    """A constant as a labelled value: positional, or uniform if all its elements are equal."""
    if isinstance(value, Labelled):
        return value
    many = value.numel() > 1 and not value.is_meta
    same = value.numel() == 1 or (many and bool((value == value.reshape(-1)[0]).all()))
    return Labelled(tuple(value.shape), uniform=same)


def register_rule(
    *targets: object,
    kind: Kind | None = None,
    linear: LinearRule | None = None,
    norm: NormRule | None = None,
    idle: IdleRule | None = None,
    joint: JointRule | None = None,
    fresh: bool = False,
    by_name: bool = True,
    uniform: bool | None = None,
) -> Callable[[R], R]:
    """Register a rule for module classes, functions, methods of torch.Tensor, or names of PyTorch operators.

    ``linear``, ``norm``, ``idle`` and ``joint`` get the arguments of a call by the names in the rule's signature.

    Args:
        targets: What the rule is for.
        kind: ``layer``: weights contract channels. ``pointwise``: it acts on each element alone. ``passive``: it
            passes on the values of its input, moved or pooled, so that the activations that decide a merge map
            are those before it. None: anything else.
        linear: Which weight a call is linear in: a `fxzip.rules.Linear` of a `fxzip.rules.Call`, or None if there is
            none; mostly made by `fxzip.rules.product`.
        norm: What a call normalises: a `fxzip.rules.Norm` of its arguments, or None if that is not known.
        idle: Whether a call with these arguments gives its input unchanged (dropout in eval mode).
        joint: What a call does to channels as vectors: a `fxzip.rules.Joint` of its arguments (`fxzip.rules.jointly`
            has PyTorch's), or None if that is not known. What ``linear`` or ``norm`` says needs no ``joint``.
        fresh: Whether the result is memory of its own, no view and no input, that what follows may write over.
        by_name: Whether a function of PyTorch stands for all that have its name (its ATen operators, its method).
            False: the rule is for these very functions, whose arguments come in another order.
        uniform: Whether constants that are all alike (a channel of zeros beside others) are all alike in the result,
            too, wherever they stand. None: they are if the kind is ``pointwise`` or ``passive``.

    Raises:
        OptionError: A rule for one of the targets exists already.
    """
    keeps = kind in ("pointwise", "passive") if uniform is None else uniform

    def register(rule: R) -> R:
        for key in dict.fromkeys(key_of(target) if by_name else target for target in targets):
            if key in _RULES:
                raise OptionError(f"a rule for {key!r} is registered already: {_RULES[key].rule.__qualname__}")
            _RULES[key] = Entry(rule, kind, linear, norm, idle, joint, fresh, isinstance(key, type), keeps)
        return rule

    return register


def target_of(module: nn.Module, node: fx.Node) -> Any:
    """What a node calls, as rules are found by it: the submodule itself at a call_module node."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def kind_of(target: object) -> Kind | None:
    """The kind that the rule of a node's target (or module) was registered with."""
    entry = find_entry(target)
    return None if entry is None else entry.kind


def unregister_rule(target: object) -> None:
    """Forget the rule of a target, so that another can be registered; raises KeyError if there is none."""
    del _RULES[target if target in _RULES else key_of(target)]


def find_rule(target: object) -> Rule | None:
    """The rule for a node's target: a function, a method's name, or a module (looked up by its class)."""
    entry = find_entry(target)
    return None if entry is None else entry.rule


def find_entry(target: object) -> Entry | None:
    """The rule for a node's target, with all that was registered with it."""
    if isinstance(target, nn.Module):
        return next((_RULES[c] for c in type(target).__mro__ if c in _RULES), None)
    try:
        exact = _RULES.get(target)
    except TypeError:
        return None
    return exact or _RULES.get(key_of(target))
