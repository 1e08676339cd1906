"""Operations that give other values each time, in eval mode too."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn

from fxzip.passes.trace.writes import name_of

_ALWAYS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "uniform",
    "random", "exponential", "geometric", "cauchy", "log_normal",
}  # fmt: skip
_IN_TRAINING = {
    "dropout": (2, True), "dropout1d": (2, True), "dropout2d": (2, True), "dropout3d": (2, True), "rrelu": (3, False),
    "alpha_dropout": (2, False), "feature_alpha_dropout": (2, False), "feature_dropout": (2, True),
}  # fmt: skip
"""Where these take ``training``, and what it is if it is not given."""


def warn_of_chance(graph_module: fx.GraphModule) -> None:
    """Warn of operations of a graph that draw random numbers, by name."""
    found = [f"{node.name} ({name_of(node)})" for node in graph_module.graph.nodes if _is_random(node, graph_module)]
    if found:
        warnings.warn(
            f"the model draws random numbers in eval mode, and so will the merged one: {', '.join(found)}", stacklevel=4
        )


def _is_random(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node).strip("_").removesuffix("_with_indices")
    if name in _IN_TRAINING:
        place, default = _IN_TRAINING[name]
        default = default or node.target is torch.dropout
        given = (
            node.args[place]
            if len(node.args) > place
            else node.kwargs.get("training", node.kwargs.get("train", default))
        )
        return given is True
    if name == "scaled_dot_product_attention":
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0))
    return name in _ALWAYS
