"""Where models part, and where they must not."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from fxzip.errors import AlignmentError
from fxzip.passes.align import Alignment, align
from fxzip.passes.trace import trace

X = torch.randn(2, 3, 32, 32)


def traced(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    return trace(model, (x,), verify=False)


def net(width: int = 8, classes: int = 5, stride: int = 1, eps: float = 1e-5, act: type[nn.Module] = nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=stride),
        nn.BatchNorm2d(width, eps=eps),
        act(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def aligned(*models: nn.Module) -> Alignment:
    return align([traced(model) for model in models])


def test_equal_models_agree_to_the_output() -> None:
    alignment = aligned(net(), net(), net())
    assert alignment.parting is None
    assert [names[0] for names in alignment.shared] == list(alignment.trunk_names(2))
    assert len(alignment.shared) == 7  # six layers and the input: the output is never shared


def test_class_counts_part_at_the_classifier() -> None:
    alignment = aligned(net(classes=120), net(classes=37))
    assert alignment.shared[-1] == ("_4", "_4")
    assert alignment.parting is not None
    for words in ("5 (Linear, weight 120 x 8, bias 120)", "37 x 8", "out_features is 120 in one and 37"):
        assert words in alignment.parting


@pytest.mark.parametrize(
    ("other", "words", "shared"),
    [
        (net(width=6), "out_channels is 8 in one and 6", 1),
        (net(stride=2), r"stride is \(1, 1\) in one and \(2, 2\)", 1),
        (net(eps=1e-3), "eps is 1e-05 in one and 0.001", 2),
        (net(act=nn.GELU), "different kinds of module", 3),
        (net().half(), "float32 in one and torch.float16", 1),
    ],
)
def test_settings_part(other: nn.Module, words: str, shared: int) -> None:
    x = X.half() if next(other.parameters()).dtype == torch.float16 else X
    alignment = align([traced(net()), traced(other, x)])
    assert len(alignment.shared) == shared
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(alignment.parting)


def test_what_does_not_matter_in_eval_mode_does_not_part() -> None:
    other = net()
    assert isinstance(other[1], nn.BatchNorm2d)
    other[1].momentum = 0.01
    other[2] = nn.ReLU(inplace=True)
    assert aligned(net(), other).parting is None


def test_the_third_model_can_be_the_one_that_parts() -> None:
    alignment = aligned(net(), net(), net(eps=1e-3))
    assert len(alignment.shared) == 2
    assert "model 2" in (alignment.parting or "")


def test_names_may_differ_and_a_segmentation_head_parts() -> None:
    classifier = traced(torchvision.models.resnet50(num_classes=3))
    segmenter = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)
    alignment = align([classifier, traced(segmenter)])
    assert "layer3.0.conv2" in (alignment.parting or "")
    assert "stride" in (alignment.parting or "")
    pairs = alignment.shared_parameters()
    assert ("layer2.0.conv1.weight", "backbone.layer2.0.conv1.weight") in pairs
    assert ("bn1.running_var", "backbone.bn1.running_var") in pairs
    assert len(set(pairs)) == len(pairs)


class Scaled(nn.Module):
    def __init__(self, scale: float, persistent: bool, steps: int = 3) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([scale]), persistent=persistent)
        self.register_buffer("index", torch.arange(steps).flip(0))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        assert isinstance(self.index, Tensor)
        return self.fc((x * self.scale)[:, self.index])  # type: ignore[no-any-return]


def test_constants_must_have_the_same_values() -> None:
    x = torch.randn(2, 3)
    assert align([traced(Scaled(1.0, False), x), traced(Scaled(1.0, False), x)]).parting is None
    parting = align([traced(Scaled(1.0, False), x), traced(Scaled(2.0, False), x)]).parting
    assert "constants" in (parting or "")
    assert "scale" in (parting or "")
    learnt = align([traced(Scaled(1.0, True), x), traced(Scaled(2.0, True), x)])
    assert learnt.parting is None
    assert ("scale", "scale") in learnt.shared_parameters()
    other = Scaled(1.0, False)
    other.index = torch.tensor([0, 2, 1])
    assert "constants" in (align([traced(Scaled(1.0, False), x), traced(other, x)]).parting or "")


class Twice(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if tied else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def test_tied_in_one_only_parts_at_the_second_use() -> None:
    x = torch.randn(2, 4)
    tied, free = traced(Twice(True), x), traced(Twice(False), x)
    for pair in ([tied, free], [free, tied]):
        alignment = align(pair)
        assert len(alignment.shared) == 3
        assert "tied" in (alignment.parting or "")
    both = align([tied, traced(Twice(True), x)])
    assert both.parting is None
    assert both.shared_parameters() == (("first.weight",) * 2, ("first.bias",) * 2)


class Branches(nn.Module):
    def __init__(self, swap: bool, power: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.swap, self.power = swap, power

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return ((b - a) if self.swap else (a - b)) ** self.power  # type: ignore[no-any-return]


def test_arguments_must_come_from_partners() -> None:
    x = torch.randn(2, 4)
    plain = traced(Branches(False), x)
    assert "different nodes" in (align([plain, traced(Branches(True), x)]).parting or "")
    assert "2 and 3" in (align([plain, traced(Branches(False, power=3), x)]).parting or "")


def test_no_models() -> None:
    with pytest.raises(AlignmentError, match="no model"):
        align([])
    assert align([traced(net())]).parting is None
