"""The ground: facts about the nodes of an fx graph, each decided here and nowhere else."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.rules.calls import Call, Linear, Norm
from fxzip.rules.keys import key_of
from fxzip.rules.registry import Entry, find_entry, kind_of, target_of

_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "setitem iadd isub imul itruediv ifloordiv imod ipow ilshift irshift iand ior ixor imatmul".split()
)
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS)
_CALLS = frozenset({"call_function", "call_method", "call_module"})
SHAPE_CHANGES = frozenset({"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"})
"""Methods that change what a tensor looks like, and none of its elements."""
_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson gumbel_softmax "
    "fractional_max_pool2d fractional_max_pool3d uniform random exponential geometric cauchy log_normal".split()
)
_RANDOM_IN_TRAINING = {
    "dropout": (2, True), "dropout1d": (2, True), "dropout2d": (2, True), "dropout3d": (2, True), "rrelu": (3, False),
    "alpha_dropout": (2, False), "feature_alpha_dropout": (2, False), "feature_dropout": (2, True),
}  # fmt: skip
"""Where these take ``training``, and what it is if it is not given."""
_NO_WRITES = SHAPE_CHANGES | {"requires_grad_", "share_memory_", "detach_", "rename_", "and_", "or_", "not_", "is_"}


# ---- what a node does


def call_writes(target: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a call of a function, or of a method by its name, writes to the memory of one of its arguments."""
    kwargs = kwargs or {}
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if target in _IN_PLACE_OPERATORS or kwargs.get("out") is not None:
        return True
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES):
        return True
    place = _place_of_inplace(target)
    given = args[place] if place is not None and place < len(args) else kwargs.get("inplace")
    return given is True


@cache
def _place_of_inplace(target: Any) -> int | None:
    """Where a function takes its argument ``inplace``; None where it has none."""
    if not inspect.isfunction(target):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


def writes_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node of ``module``'s graph writes to the memory of one of its arguments."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False) is True
    return node.op in ("call_function", "call_method") and call_writes(node.target, node.args, node.kwargs)


def is_random(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node draws random numbers, in eval mode too."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(key_of(node.target)).removesuffix("_with_indices")
    if draws_in_training(node):
        place, default = _RANDOM_IN_TRAINING[name]
        default = default or node.target is torch.dropout
        named = node.kwargs.get("training", node.kwargs.get("train", default))
        return (node.args[place] if len(node.args) > place else named) is True
    if name == "scaled_dot_product_attention":
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0))
    return name in _RANDOM


def draws_in_training(node: fx.Node) -> bool:
    """Whether a node calls a function that is random where it is told that this is training (``F.dropout``)."""
    return node.op in ("call_function", "call_method") and str(key_of(node.target)) in _RANDOM_IN_TRAINING


def is_relu(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a ReLU: a module, a function, a method or an ATen operator, in place or not."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.ReLU)
    return node.op in ("call_function", "call_method") and key_of(node.target) == "relu"


def has_effect(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node does more than give a result: it is part of the signature, writes in place, or observes."""
    if node.op in ("placeholder", "output") or writes_in_place(node, module):
        return True
    return node.op == "call_module" and getattr(module.get_submodule(str(node.target)), "_is_impure", False) is True


# ---- what the rule of a node's operation says of it, and what it depends on


def _entry(module: nn.Module, node: fx.Node) -> Entry | None:
    return find_entry(target_of(module, node)) if node.op in ("call_module", "call_function", "call_method") else None


def named_call(module: nn.Module, node: fx.Node) -> Call | None:
    """A node as a call with named arguments; None where no rule says how they are called."""
    entry = _entry(module, node)
    if entry is None:
        return None
    target, arguments = target_of(module, node), entry.arguments(node.args, node.kwargs)
    called = target if isinstance(target, nn.Module) else None
    if called is not None:
        arguments = {**vars(called), **called._parameters, **called._buffers, **arguments}
    return Call(node, called, entry.names, arguments, partial(attribute, module))


def linear_of(module: nn.Module, node: fx.Node) -> Linear | None:
    """The weight that a node is linear in; None where there is none, or its rule does not say."""
    entry, call = _entry(module, node), named_call(module, node)
    return None if entry is None or entry.linear is None or call is None else entry.linear(call)


def norm_of(module: nn.Module, node: fx.Node) -> Norm | None:
    """What a node normalises; None for anything but a norm."""
    entry, call = _entry(module, node), named_call(module, node)
    return None if entry is None or entry.norm is None or call is None else entry.norm(call.arguments)


def does_nothing(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node gives its only input unchanged: an identity, or a dropout in eval mode."""
    entry, call = _entry(module, node), named_call(module, node)
    if entry is None or entry.idle is None or call is None or len(node.all_input_nodes) != 1:
        return False
    return entry.idle(call.arguments)


def is_fresh(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's result is memory of its own: no view, no input and no parameter."""
    entry = _entry(module, node)
    return entry is not None and entry.fresh and not writes_in_place(node, module)


def is_static(node: Any) -> bool:
    """Whether a node is a parameter or buffer, or one that is only moved about."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or kind_of(node.target) != "passive":
        return False
    return bool(node.all_input_nodes) and all(map(is_static, node.all_input_nodes))


def static_value(module: nn.Module, node: Any) -> Tensor | None:
    """The tensor that a static node stands for; None for anything else."""
    if not is_static(node):
        return None
    value = _made(module, node)
    return value.detach() if isinstance(value, Tensor) else None


def _made(module: nn.Module, node: fx.Node) -> Any:
    return compute(module, node, lambda source: _made(module, source))


def learned(module: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    """The nodes that depend on no input and on no chance, each with the names of the attributes that it is made of."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({str(node.target)})
        elif node.op in _CALLS and all(n in found for n in node.all_input_nodes):
            if writes_in_place(node, module) or is_random(node, module):
                continue
            found[node] = frozenset().union(*(found[n] for n in node.all_input_nodes))
    return found


def parameter_uses(module: nn.Module, nodes: Iterable[fx.Node]) -> Counter[int]:
    """How many of the nodes use each parameter, by its identity: modules are called again, parameters tied."""
    used: Counter[int] = Counter()
    for node in nodes:
        if node.op == "call_module":
            used.update(id(p) for p in module.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            value = attribute(module, str(node.target))
            if isinstance(value, Tensor):
                used[id(value)] += len(node.users)
    return used


def attribute(module: nn.Module, target: str) -> Any:
    """What a qualified name stands for in ``module``."""
    return operator.attrgetter(target)(module)


def compute(module: nn.Module, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """What a node gives, the values of its inputs being what ``value_of`` says; not for placeholders and outputs."""
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return run_call(target_of(module, node), args, kwargs)


def run_call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module, a function, or a method by its name."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the inputs, in order."""
    return module.graph.find_nodes(op="placeholder")


def bind_inputs(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """The inputs of a call by the graph's placeholders, in their order.

    Raises:
        TypeError: There are too many inputs, one that the graph does not take, or one that it needs is missing.
    """
    nodes = placeholders(module)
    names = [str(node.target).lstrip("*") for node in nodes]
    takes = f"the model takes {', '.join(names) or 'no input'}"
    if len(args) > len(nodes):
        raise TypeError(f"{len(args)} inputs were given: {takes}")
    found = dict(zip(nodes, args, strict=False))
    unknown = set(kwargs) - set(names[len(args) :])
    if unknown:
        raise TypeError(f"the model takes no input {', '.join(sorted(unknown))}; it takes {', '.join(names)}")
    for node, name in zip(nodes[len(args) :], names[len(args) :], strict=True):
        if name in kwargs:
            found[node] = kwargs[name]
        elif node.args:
            found[node] = node.args[0]
        else:
            raise TypeError(f"the input {name} is missing: {takes}")
    return found


def nodes_by_name(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes of a graph by their names."""
    return {node.name: node for node in module.graph.nodes}


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name, with underscores behind it where it is taken."""
    while wanted in taken:
        wanted += "_"
    return wanted


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a qualified name is one of these modules, or of something in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def new_parameter(module: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A get_attr node before ``node``, for a new parameter that takes no gradients, named after both."""
    target = free_name(f"{node.name}_{name}", dir(module))
    module.register_parameter(target, nn.Parameter(value, requires_grad=False))
    with module.graph.inserting_before(node):
        return module.graph.get_attr(target)


def drop_dead_nodes(graph: fx.Graph, module: nn.Module) -> None:
    """Erase the nodes that nobody uses and that have no effect; ``module`` holds what they name."""
    for node in reversed(list(graph.nodes)):
        if not node.users and not has_effect(node, module):
            graph.erase_node(node)


def drop_dead_code(module: fx.GraphModule) -> None:
    """Erase the nodes that nobody uses and that have no effect, and the modules that no node calls then."""
    drop_dead_nodes(module.graph, module)
    module.delete_all_unused_submodules()
    module.recompile()


def drop_unused(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Forget those of the named parameters that no node uses, so that they are neither counted nor saved."""
    used = {str(n.target) for n in module.graph.find_nodes(op="get_attr")}
    called = {str(n.target) for n in module.graph.find_nodes(op="call_module")}
    owners = dict(module.named_modules())
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if name not in used and owner not in called and hasattr(owners.get(owner), leaf):
            delattr(owners[owner], leaf)
