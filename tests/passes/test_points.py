"""Where spaces are observed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import OptionError
from fxzip.passes.points import Points, merge_points
from tests.nets import Net, Residual, chain, conv
from tests.oracles import TOLERANCE, images, randomise, self_zip_errors

X = images(6, 8)


def points(model: nn.Module, which: Points = "last", until: str | None = None) -> dict[str, list[str]]:
    """The nodes that each space is observed at, in the trunk before a cut."""
    model = randomise(model, X)
    prepared = fxzip.prepare(model, model, example_inputs=X)
    nodes = prepared.alignment.trunk_names(0)[: prepared.place(until)]
    found = merge_points(prepared.alignment.modules[0], prepared.spec, nodes, which)
    return {name: [point.node for point in mine] for name, mine in found.items()}


def test_a_stage_is_observed_at_its_last_activation_or_at_all() -> None:
    assert points(Residual()) == {
        "stem": ["relu_3"],  # the stage's end, before the pool
        "layer1.conv1": ["relu_1"],
        "layer1.gate.down": ["relu_2"],
        "layer2.conv1": ["relu_4"],
        "layer2.gate.down": ["relu_5"],
        "layer2.conv2": ["relu_6"],  # before the pool and the flatten
    }
    every = points(Residual(), "all")
    assert every["stem"] == ["relu", "layer1_norm2", "relu_3"]  # layer1.conv1, the gate, and layer2
    assert every["layer2.conv2"] == ["layer2_norm2", "relu_6"]
    assert every["layer1.conv1"] == ["relu_1"]


def pooled(m: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(m.a(x)), 2)
    x = F.interpolate(F.avg_pool2d(F.relu(m.b(x)).roll(1, 2), 2), scale_factor=2)
    return m.head(F.adaptive_avg_pool2d(F.pad(m.c(x).sigmoid(), (1, 1)), 1).flatten(1))


def test_what_only_moves_or_pools_is_stepped_back_over() -> None:
    net = Net(pooled, a=conv(3, 8), b=conv(8, 6), c=conv(6, 5), head=nn.Linear(5, 3))
    assert points(net) == points(net, "all") == {"a": ["relu"], "b": ["relu_1"], "c": ["sigmoid"]}


def test_the_place_of_the_channels_is_that_of_the_activation() -> None:
    def tokens(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.fc(F.relu(m.a(x)).flatten(2).transpose(1, 2))).mean(1))

    model = randomise(Net(tokens, a=conv(3, 8), fc=nn.Linear(8, 6), head=nn.Linear(6, 3)), X)
    prepared = fxzip.prepare(model, model, example_inputs=X)
    found = merge_points(
        prepared.alignment.modules[0],
        prepared.spec,
        prepared.alignment.trunk_names(0)[: prepared.place(None)],
    )
    (a,), (fc,) = found["a"], found["fc"]
    assert (a.node, a.axes) == ("relu", (1,))
    assert torch.equal(a.index, torch.arange(8)[:, None])
    assert (fc.node, fc.axes) == ("relu_1", (2,))
    assert prepared.observe([X], hold_back=False, progress=False).moments["fc"].count == 6 * 64


def test_copies_after_a_flatten_are_samples_of_the_activation() -> None:
    def flat(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x).flatten(1)))

    net = Net(flat, a=conv(3, 8), head=nn.Linear(8 * 64, 3))
    net = randomise(net, X)
    assert points(net) == {"a": ["relu"]}
    prepared = fxzip.prepare(net, net, example_inputs=X).observe([X], hold_back=False, progress=False)
    assert prepared.moments["a"].count == 6 * 64
    assert len(prepared.moments["a"].mean) == 16


def test_only_what_is_before_the_end_is_observed() -> None:
    found = points(Residual(), "last", "layer1.conv2")
    assert found == {"stem": ["relu"], "layer1.conv1": ["relu_1"]}
    assert points(Residual(), "last", "norm") == {"stem": ["stem"]}


def test_blocks_are_observed_by_what_lies_in_them_or_else_themselves() -> None:
    net = Net(chain, a=conv(3, 8), act=nn.ReLU(), b=conv(8, 16, groups=8), act2=nn.ReLU(), head=nn.Linear(16, 3))
    assert points(net) == {"b": ["act2"]}
    assert points(net, "last", "b") == {"a": ["act"]}


def test_a_space_of_one_channel_leaves_nothing_to_decide() -> None:
    def gated(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.head((x * m.gate(x).sigmoid()).mean((2, 3)))

    assert "gate" not in points(Net(gated, a=conv(3, 8), gate=conv(8, 1), head=nn.Linear(8, 3)), "all")


def test_unknown_points() -> None:
    with pytest.raises(OptionError, match="'best' is unknown; use 'last' or 'all'"):
        points(Residual(), "best")  # type: ignore[arg-type]


def mixed(m: Net, x: Tensor) -> Tensor:
    x = m.embed(x).flatten(2)
    x = x + m.up(F.gelu(m.down(x)))
    return m.head(m.norm(x.transpose(1, 2)).mean(1))


def test_the_channels_of_another_space_are_no_samples() -> None:
    """A mixer: which channel of one model is which of another's is not known when its tokens are matched."""
    layers = {"embed": nn.Conv2d(3, 8, 2, 2), "down": nn.Linear(16, 6), "up": nn.Linear(6, 16)}
    net = randomise(Net(mixed, **layers, norm=nn.LayerNorm(8), head=nn.Linear(8, 3)), X)
    prepared = fxzip.prepare(net, net, example_inputs=X)
    found = merge_points(prepared.alignment.modules[0], prepared.spec, prepared.alignment.trunk_names(0))
    (point,) = found["down"]
    assert (point.axes, point.pooled) == ((2,), (1,))
    assert max(self_zip_errors(net, X).values()) < TOLERANCE


def test_copies_of_a_channel_at_those_of_another_space_are_no_samples_either() -> None:
    """Of two tokens only the first is changed, so the channels lie along three axes with those of the other space."""

    def outer(m: Net, x: Tensor) -> Tensor:
        value = m.a(x.flatten(2).transpose(1, 2)[:, :2]).sin()[..., None] * m.b.weight
        value[:, 0] = value[:, 0].sin()
        return m.head(value.amax((2, 3)))

    net = randomise(Net(outer, a=nn.Linear(3, 5), b=nn.Linear(8, 1), head=nn.Linear(2, 3)), X)
    prepared = fxzip.prepare(net, net, example_inputs=X)
    found = merge_points(prepared.alignment.modules[0], prepared.spec, prepared.alignment.trunk_names(0))
    (point,) = found["b"]
    assert (point.axes, point.index.shape, point.mixed) == ((1, 2, 3), (8, 5), True)
    assert max(self_zip_errors(net, X).values()) < TOLERANCE
