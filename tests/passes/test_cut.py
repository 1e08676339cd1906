"""Where models can be cut, and by what names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.errors import CutError
from fxzip.graphs import learned
from fxzip.passes.cut import Cuts, classifiers
from fxzip.passes.trace import trace
from tests.nets import Net, Residual, conv
from tests.oracles import images, randomise

X = images(4, 8)


def traced(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    return trace(randomise(model, x), (x,))


def cuts(*models: nn.Module) -> Cuts:
    return fxzip.prepare(*(randomise(model, X) for model in models), example_inputs=X).places.cuts


def last_layers(model: nn.Module) -> set[str]:
    return {node.name for node in classifiers(traced(model))}


def net(body: Any, classes: int = 3) -> Net:
    return Net(body, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, classes), other=nn.Linear(8, 4))


def one_head(m: Net, x: Tensor) -> Tensor:
    return m.head(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def two_heads(m: Net, x: Tensor) -> Any:
    x = F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))
    return {"one": m.head(x).log_softmax(1), "two": [m.other(x)]}


def features_too(m: Net, x: Tensor) -> Any:
    x = F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))
    return m.head(x), x


def skip_to_the_output(m: Net, x: Tensor) -> Any:
    x = F.relu(m.a(x))
    return m.head((x := x + m.b(x)).mean((2, 3))), x


def test_classifiers_are_the_layers_whose_channels_are_outputs() -> None:
    assert last_layers(net(one_head)) == {"head"}
    assert last_layers(net(two_heads)) == {"head", "other"}
    assert last_layers(net(features_too)) == {"head", "b"}
    assert last_layers(net(skip_to_the_output)) == {"head", "a", "b"}
    squeeze = torchvision.models.squeezenet1_1(num_classes=3)
    assert {n.target for n in classifiers(traced(squeeze, images(2, 64)))} == {"classifier.1"}


def test_the_default_cut_is_before_the_classifiers_of_all_models() -> None:
    def default(*bodies: Any) -> str | None:
        found = cuts(*(net(body) for body in bodies))
        return found.names[-1]

    assert default(one_head, one_head) == "head"
    assert default(two_heads, two_heads) == "head"
    assert default(features_too, features_too) == "b"
    assert default(one_head, features_too) == default(features_too, one_head) == "b"


def test_the_default_cut_is_where_the_models_part() -> None:
    def widened(m: Net, x: Tensor) -> Tensor:
        return m.head(F.gelu(m.b(F.relu(m.a(x)))).mean((2, 3)))

    found = cuts(net(one_head), net(widened))
    assert found.names == ("a", "relu", "b", "relu_1")  # the parting node is where the heads begin
    assert found.resolve("relu_1") == found.default == found.valid[-1]
    assert cuts(net(one_head, 3), net(one_head, 4)).names[-1] == "head"


def test_modules_are_named_by_what_runs_first_in_them() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(x))

    model = nn.Sequential(
        conv(3, 8), nn.Sequential(Before(), Before()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    found = cuts(model, model)
    assert found.named["1"] == found.named["1.0"] == found.named["relu"] == found.named["1.0.conv"] - 1
    assert found.named["1.1"] == found.named["relu_1"]
    assert found.names == ("0", "1", "1.0.conv", "1.1", "1.1.conv", "2", "3", "4")


def test_parameters_are_no_cuts_and_cross_none() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.head = conv(3, 8), nn.Parameter(torch.rand(8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale.view(-1, 1, 1)
            return self.head((F.relu(self.a(x) * scale) * scale).mean((2, 3)))

    assert {"scale", "view"} <= {node.name for node in learned(traced(Scaled()))}
    found = cuts(Scaled(), Scaled())
    assert "scale" not in found.named
    prepared = fxzip.prepare(randomise(Scaled(), X), randomise(Scaled(), X, 1), example_inputs=X)
    # refit would fold the trunk's scale into the layer before it
    zipped = prepared.observe([X], progress=False).convert(cut="relu", refit=False, progress=False)
    assert [len(head.graph.find_nodes(op="placeholder")) for head in zipped.heads.values()] == [1, 1]
    scales = [zipped.get_parameter(f"{part}.scale") for part in ("trunk", "heads.task0", "heads.task1")]
    assert torch.equal(scales[1], prepared.alignment.modules[0].scale)
    assert torch.equal(scales[2], prepared.alignment.modules[1].scale)
    assert not torch.equal(scales[0], scales[1])


def test_shares_are_of_the_layers_and_end_at_the_default() -> None:
    found = cuts(Residual(), Residual())
    assert found.resolve(None) == found.resolve(1.0) == found.default
    assert found.resolve(0) == found.valid[0] == 1
    for count, layer in enumerate(found.layers):
        assert found.resolve(count / len(found.layers)) == layer
    places = [found.resolve(share / 20) for share in range(21)]
    assert places == sorted(places)


def test_unknown_names_and_places_that_are_none() -> None:
    found = cuts(Residual(), Residual())
    with pytest.raises(CutError, match=r"'layer1.conv': no shared module or node.*valid nearby: layer1\.conv2, "):
        found.resolve("layer1.conv")
    with pytest.raises(CutError, match="no shared module or node"):
        found.resolve("x")  # the images


@pytest.mark.filterwarnings("ignore::fxzip.FrozenSpaceWarning")
def test_frozen_channels_do_not_cross() -> None:
    def ordered(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.head(F.relu(m.b(x.cumsum(1))).mean((2, 3)))

    found = cuts(net(ordered), net(ordered))
    assert found.names == ("a", "b", "relu_1", "mean", "head")
    with pytest.raises(CutError, match="kept in place"):
        found.resolve("cumsum")
