"""Trunk and heads at any cut, on networks of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.passes.cut import MergePlan, crossing
from fxzip.passes.match import match_spaces
from fxzip.passes.split import split
from tests.nets import Net, Residual, chain, conv, pair
from tests.oracles import TOLERANCE, call, difference, images, randomise, self_zip_errors

X = images(8, 8)
LINEAR = nn.Linear


def dense(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x = torch.cat([x, m.b(F.relu(x))], 1)
    x = torch.cat([x, m.c(F.relu(m.norm(x)))], 1)
    return m.head(x.amax((2, 3)))


def halves(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    x = torch.cat([left, m.b(right)], 1)
    b, c, h, w = x.shape
    x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.head(F.relu(x).flatten(1))


def in_place(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    y = m.norm(m.b(x))
    y += x
    y.relu_()
    z = m.c(y)
    z = F.hardswish(z + y, inplace=True)
    return m.head(z.mean((2, 3)))


def gated(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    return m.head(F.relu(m.b(x * m.gate(x).sigmoid())).mean((2, 3)))


def tokens(m: Net, x: Tensor) -> Tensor:
    b, n, c = (x := m.embed(x).flatten(2).transpose(1, 2)).shape
    q, k, v = m.qkv(m.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + m.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
    return m.head(x.mean(1))


def scaled(m: Net, x: Tensor) -> Tensor:
    gamma = m.norm.weight.view(1, -1, 1, 1)
    return m.head(F.relu(F.relu(m.a(x) * gamma) + gamma).mean((2, 3)))


def again(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    x = F.relu(m.b(x)) + x
    return m.head((F.relu(m.b(x)) + x).mean((2, 3)))


CASES = {
    "dense": Net(dense, a=conv(3, 8), b=conv(8, 4), norm=nn.BatchNorm2d(12), c=conv(12, 4), head=LINEAR(16, 3)),
    "halves and flatten": Net(halves, a=conv(3, 8), b=conv(4, 4), head=LINEAR(8 * 64, 3)),
    "in place": Net(in_place, a=conv(3, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8), c=conv(8, 8), head=LINEAR(8, 3)),
    "a gate of one channel": Net(gated, a=conv(3, 8), gate=conv(8, 1), b=conv(8, 6), head=LINEAR(6, 3)),
    "attention": Net(
        tokens,
        embed=nn.Conv2d(3, 8, 4, 4),
        norm=nn.LayerNorm(8),
        qkv=LINEAR(8, 24),
        proj=LINEAR(8, 8),
        head=LINEAR(8, 3),
    ),
    "a parameter": Net(scaled, a=conv(3, 8), norm=nn.BatchNorm2d(8), head=LINEAR(8, 3)),
    "a layer called again": Net(again, a=conv(3, 8), b=conv(8, 8), head=LINEAR(8, 3)),
    "groups in groups": Net(
        chain,
        a=conv(3, 4),
        b=conv(4, 8, groups=4),
        act=nn.ReLU(),
        c=conv(8, 16, groups=8),
        act2=nn.ReLU(),
        d=conv(16, 16, groups=4),
        act3=nn.ReLU(),
        head=LINEAR(16, 3),
    ),
    "group norm": Net(chain, a=conv(3, 8), norm=nn.GroupNorm(4, 8), act=nn.GELU(), b=conv(8, 4), head=LINEAR(4, 3)),
    "transposed": Net(
        chain, a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, 2, groups=4), act=nn.ReLU(), head=LINEAR(12, 3)
    ),
    "slopes": Net(chain, a=conv(3, 8), act=nn.PReLU(8), glu=nn.GLU(1), head=LINEAR(4, 3)),
    "subpixels": Net(
        chain,
        a=conv(3, 16),
        up=nn.PixelShuffle(2),
        b=conv(4, 8),
        down=nn.PixelUnshuffle(2),
        head=LINEAR(32, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_self_zip_is_exact_at_every_place(name: str) -> None:
    errors = self_zip_errors(randomise(CASES[name], X), X)
    assert len(errors) >= 4
    assert {cut: error for cut, error in errors.items() if error > TOLERANCE} == {}


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    return fxzip.prepare(*pair(Residual, X), example_inputs=X).observe([X], progress=False)


def flat(m: Net, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(m.a(x)), 2)
    return m.head(F.relu(m.fc(x.flatten(1)) + m.fc2(F.gelu(x).flatten(1))))


def test_u_folded_is_the_gather(prepared: fxzip.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = pair(lambda: Net(flat, a=conv(3, 8), fc=LINEAR(128, 6), fc2=LINEAR(128, 6), head=LINEAR(6, 3)), X)
    flattened = fxzip.prepare(*nets, example_inputs=X).observe([X], progress=False)
    options = {"method": "zip", "alpha": 1.0, "beta": 1.0, "refit": False, "reset_batch_norm": False, "progress": False}
    # The gathers in each head, without and with folds: where a skip crosses there stays one.
    expected = {
        "layer1.conv2": (2, 1),
        "relu_3": (1, 0),
        "fc": (1, 0),
        "relu": (1, 0),
        "max_pool2d": (1, 0),
        "relu_1": (1, 0),
    }

    def gathers(zipped: fxzip.ZippedModel) -> list[str]:
        return [key for key in zipped.state_dict() if "unmerge_" in key]

    for made, cuts in (
        (prepared, ("layer1.conv2", "relu_3", "fc")),
        (flattened, ("relu", "max_pool2d", "relu_1")),
    ):
        for cut in cuts:
            with monkeypatch.context() as patch:
                folded = made.convert(cut=cut, **options)
                patch.setattr("fxzip.passes.split.heads.foldable", lambda *_: None)
                gathered = made.convert(cut=cut, **options)
            assert difference(call(gathered, X), call(folded, X)) < TOLERANCE
            assert (len(gathers(gathered)) / 2, len(gathers(folded)) / 2) == expected[cut]
            assert {row.within > 0 for row in folded.report.spaces} >= {True}


def test_a_folded_weight_is_w_times_u(prepared: fxzip.Prepared) -> None:
    names = {space.name for space in prepared.spec.spaces}
    maps = match_spaces(prepared.spec, prepared.moments, "zip", 2, names, alpha=1.0, beta=1.0)
    parts = split(MergePlan(prepared.alignment, prepared.spec, maps, 0, prepared.place("fc")))
    for model, head in enumerate(parts.heads):
        weight = prepared.alignment.modules[model].get_parameter("fc.weight").detach()
        unmerge = maps["layer2.conv2"].part(model, "contract").T
        assert (head.get_parameter("fc.weight") - weight @ unmerge).abs().max() < 1e-12


def test_a_weight_with_other_users_is_not_folded() -> None:
    def tied(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.head((m.b(x) + m.c(F.relu(m.b(x)))).mean((2, 3)))

    def make() -> nn.Module:
        return Net(tied, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=LINEAR(8, 3))

    models = pair(make, X)
    prepared = fxzip.prepare(*models, example_inputs=X).observe([X], progress=False)
    zipped = prepared.convert(cut="b", method="permute", progress=False)
    for model, name in zip(models, zipped.names, strict=True):
        assert torch.equal(zipped.get_parameter(f"heads.{name}.b.weight"), model.b.weight)


def test_what_crosses_is_what_is_used_after_the_cut(prepared: fxzip.Prepared) -> None:
    names = prepared.alignment.trunk_names(0)

    def cross(cut: str) -> list[str]:
        return [names[i] for i in crossing(prepared.alignment, prepared.place(cut))]

    assert cross("stem") == ["x"]
    assert cross("norm") == ["stem"]
    assert cross("layer1.norm1") == ["relu", "layer1_conv1"]
    assert cross("layer1.gate") == ["relu", "layer1_norm2"]
    assert cross("layer1.gate.down") == ["relu", "layer1_norm2", "mean"]
    assert cross("fc") == ["flatten"]


def test_trunk_and_heads_have_the_parameters_that_they_use(prepared: fxzip.Prepared) -> None:
    zipped = prepared.convert(cut="layer2", method="permute", refit=False, progress=False)
    assert {name.split(".")[0] for name in zipped.trunk.state_dict()} == {"stem", "norm", "layer1"}
    state = {key for key in zipped.heads["task0"].state_dict() if not key.startswith("unmerge")}
    assert {name.split(".")[0] for name in state} == {"layer2", "fc"}
    ours = {id(p) for p in zipped.parameters()}
    assert not ours & {id(p) for module in prepared.alignment.modules for p in module.parameters()}
    for part in (zipped.trunk, *zipped.heads.values()):
        part.graph.lint()
        assert not part.training


def test_parameters_are_paired_by_their_nodes(prepared: fxzip.Prepared) -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    other = randomise(Renamed(), X)
    pairs = fxzip.prepare(randomise(Residual(), X, 1), other, example_inputs=X)
    found = pairs.alignment.peers(pairs.place("layer2"))
    assert found["layer1.conv1.weight"] == ("layer1.conv1.weight", "backbone.layer1.conv1.weight")
    assert not any(name.startswith(("layer2", "fc")) for name in found)
    pairs.observe([X], progress=False)
    zipped = pairs.convert(cut="layer2", method="permute", progress=False)
    assert "heads.task0.fc.weight" in zipped.state_dict()
    assert "heads.task1.backbone.fc.weight" in zipped.state_dict()


def unmerged(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.a(x)).movedim(1, -1)
    x = F.relu(F.linear(x.clone() * x.clone(), m.b.weight)).movedim(-1, 1)
    x.add_(1)
    return F.linear(F.relu(x).mean((2, 3)), m.head.weight)


@pytest.mark.parametrize("refit", [False, True])
def test_heads_keep_the_names_of_the_models_nodes(refit: bool) -> None:
    models = pair(lambda: Net(unmerged, a=conv(3, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 4)), X)
    prepared = fxzip.prepare(*models, example_inputs=X).observe([X], progress=False)
    names = {node.name for node in prepared.alignment.modules[0].graph.nodes}
    assert {"movedim", "linear", "clone"} <= names
    for method in ("select", "permute"):  # a dense unmerge, and a gather
        zipped = prepared.convert(cut="relu", method=method, refit=refit, reset_batch_norm=False, progress=False)
        for head in zipped.heads.values():
            own = {node.name for node in head.graph.nodes}
            assert {"movedim", "linear", "clone", "clone_1"} <= own, own
