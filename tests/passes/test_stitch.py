"""Stitching: networks that share nothing, of which one goes on from the other's features."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip.errors import AlignmentError, CutError, OptionError, RestoreError
from fxzip.passes.align import align
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.stitch import find_spots, head_of, weave
from fxzip.passes.trace import trace
from tests.nets import Net, Residual, chain, conv, untouched
from tests.oracles import randomise

X = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOADER = list(torch.randn(300, 3, 12, 12, generator=torch.Generator().manual_seed(1)).split(50))


def plain() -> nn.Module:
    """Convolutions and poolings in a row, as a VGG has them."""
    layers = [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 9), nn.BatchNorm2d(9), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4))


class Tokens(nn.Module):
    """Patches as tokens, channels last, with a residual MLP."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), activation(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.mlp(self.norm(x))
        return self.head(x.mean(1))


@pytest.fixture
def nets() -> list[nn.Module]:
    torch.manual_seed(0)
    return [randomise(Residual(), X).float(), randomise(plain(), X).float()]


def stitched(*models: nn.Module, **options: object) -> fxzip.ZippedModel:
    return fxzip.zip(*models, loader=LOADER, stitch=True, progress=False, effort="fast", **options)


def test_a_network_that_goes_on_from_its_own_features_is_itself() -> None:
    """Between the same places of a network and itself the map is the identity, and the fit finds it."""
    model = randomise(Residual(), X).float()
    images = list(torch.randn(800, 3, 12, 12, generator=torch.Generator().manual_seed(2)).split(100))
    refit = fxzip.RefitOptions(ridge=1e-7, rounds=0)
    zipped = fxzip.zip(model, model, images, stitch=True, progress=False, refit=refit)
    for output in zipped(LOADER[0]):
        torch.testing.assert_close(output, model(LOADER[0]), rtol=1e-2, atol=1e-2)


def test_the_trunk_s_network_stays_as_it_is_and_the_models_too(nets: list[nn.Module]) -> None:
    with untouched(*nets):
        zipped = stitched(*nets)
    (trunk,) = (k for k in (0, 1) if f"of task{k}, stitched" in zipped.report.cut)
    outputs = zipped(LOADER[0])
    torch.testing.assert_close(outputs[trunk], nets[trunk](LOADER[0]), rtol=1e-4, atol=1e-4)
    assert outputs[1 - trunk].shape == nets[1 - trunk](LOADER[0]).shape
    assert zipped.report.flops_after <= 1.5 / 2 * zipped.report.flops_before
    assert zipped.report.refitted
    assert zipped.report.verified is not None
    assert zipped.report.verified.ensemble is not None
    assert len(zipped.report.tried) > 1


def test_it_explains_more_than_a_constant(nets: list[nn.Module]) -> None:
    """Random features of noise tell little of one another; those of trained networks are benchmarks.unequal's."""
    fidelity = stitched(*nets).report.fidelity
    assert fidelity is not None
    assert max(answer.unexplained for answer in fidelity.answers) < 0.95


def test_the_woven_network_computes_the_rest_of_the_other_one() -> None:
    """With the map as an identity between a network's own places, what is woven is the network."""
    model = randomise(Residual(), X)
    graph = canonicalise(trace(model, (X,)))
    spots = find_spots(0, align([graph]), analyse_graph(graph, (X,), {}))
    spot = next(spot for spot in spots.entering if len(spot.shape) == 3 and 0 < spot.depth < 1)
    woven = weave((graph,), spot, spot)
    stitch = woven.get_submodule("stitch")
    nn.init.dirac_(stitch.weight)
    torch.testing.assert_close(woven(X), model(X))
    head = head_of(woven, spot)
    assert len(head.graph.find_nodes(op="placeholder")) == 1


def test_maps_of_other_grids_and_tokens() -> None:
    for one, other in ((Tokens(8, nn.GELU), Tokens(6, nn.ReLU)), (Residual(), Tokens(6, nn.ReLU))):
        models = [randomise(one, X).float(), randomise(other, X).float()]
        zipped = stitched(*models, cut="flops<=1.9x")
        assert all(output.isfinite().all() for output in zipped(LOADER[0]))


def test_save_and_load_to_the_bit_and_select(nets: list[nn.Module], tmp_path: Path) -> None:
    zipped = stitched(*nets)
    loaded = fxzip.load(zipped.save(tmp_path / "stitched"))
    for found, expected in zip(loaded(LOADER[0]), zipped(LOADER[0]), strict=True):
        assert torch.equal(found, expected)
    assert loaded.report.cut == zipped.report.cut
    assert torch.equal(zipped.select(["task1"])(LOADER[0])[0], zipped(LOADER[0])[1])


def test_it_has_no_original_class(nets: list[nn.Module], tmp_path: Path) -> None:
    zipped = stitched(*nets)
    zipped.save(tmp_path / "out")
    for network in (zipped, fxzip.load(tmp_path / "out"), zipped.select(["task1"])):
        for given in (None, nets[: len(network.names)]):
            with pytest.raises(
                RestoreError, match=r"is stitched \(.* of task., stitched to .*\): .* no original class"
            ):
                network.as_models(given)
    with pytest.raises(RestoreError, match="is stitched"):
        zipped.save(tmp_path / "models", layout="models")


def test_coverage_is_that_of_the_trunk_s_network(nets: list[nn.Module]) -> None:
    zipped = stitched(*nets)
    (trunk,) = (k for k in (0, 1) if f"of task{k}, stitched" in zipped.report.cut)
    assert zipped.report.coverage == fxzip.analyse(nets[trunk], X[:2].float()).coverage


def test_export(nets: list[nn.Module], tmp_path: Path) -> None:
    """The export is compared with the network where it is made."""
    stitched(*nets).export(tmp_path / "stitched.onnx")


def test_the_place_and_the_budget_are_the_user_s(nets: list[nn.Module]) -> None:
    named = stitched(*nets, cut="0.4")
    assert named.report.cut.startswith("0.4 of task1, stitched to ")
    for budget in (1.2, 1.9):
        found = stitched(*nets, cut=f"flops<={budget}x").report
        assert found.flops_after <= budget / 2 * found.flops_before


def test_a_bound_on_fidelity_takes_the_cheapest(nets: list[nn.Module]) -> None:
    easy = stitched(*nets, cut="fidelity>=0.1").report.flops_after
    assert easy <= stitched(*nets, cut="flops<=1.9x").report.flops_after
    with pytest.raises(CutError, match=r"no stitched network that was tried keeps it; the best, .*networks' FLOPs"):
        stitched(*nets, cut="fidelity>=1.0")


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"method": "zip"}, OptionError, r"matches no channels, so it takes no method='zip'"),
        ({"width": 1.2}, OptionError, r"so it takes no width=1\.2"),
        ({"start": 0.2}, OptionError, r"so it takes no start"),
        ({"heads": "mean"}, OptionError, r"so it takes no heads"),
        ({"refit": False}, OptionError, r"the map between the networks is solved by refit"),
        ({"cut": "nowhere"}, CutError, r"neither network has a module or node of that name"),
        ({"cut": "flops<=0.01x"}, CutError, r"costs at most 0\.01 networks' FLOPs; the cheapest costs"),
    ],
)
def test_bad_arguments(nets: list[nn.Module], given: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fxzip.zip(*nets, loader=LOADER, stitch=True, progress=False, **given)


def test_three_networks_and_no_bool(nets: list[nn.Module]) -> None:
    with pytest.raises(OptionError, match="takes two models, and 3 are given"):
        stitched(*nets, plain())
    with pytest.raises(OptionError, match="give True or False"):
        fxzip.zip(*nets, loader=LOADER, stitch="yes", progress=False)


def test_networks_that_share_nothing_are_told_of_it() -> None:
    models = [randomise(Net(chain, a=conv(3, n), b=conv(n, 6), head=nn.Linear(6, 3)), X).float() for n in (7, 8)]
    models[1].a = conv(3, 8, 1)
    with pytest.raises(AlignmentError, match=re.escape("stitch=True merges networks that share nothing")):
        fxzip.zip(*models, loader=LOADER, progress=False)
