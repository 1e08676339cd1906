"""The polish pass: steps of all layers together on the outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import fxzip
from fxzip.data.batches import Given
from fxzip.passes.polish import polish
from fxzip.passes.polish.curvature import Curvature, parameters
from fxzip.passes.polish.distance import Distance, Variation
from fxzip.passes.polish.goal import Goal, in_parts
from fxzip.passes.polish.network import Network
from fxzip.passes.split import split


def seeded(make: Any, *seeds: int) -> list[nn.Module]:
    """Networks of one class, each from its seed."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(make().eval())
    return found


class Words(nn.Module):
    """Embedding, a residual MLP after a norm, a read-out for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 12), nn.LayerNorm(12)
        self.up, self.down, self.out = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.out(y + self.down(nn.functional.gelu(self.up(self.norm(y)))))


def convolutional() -> nn.Module:
    """A strided, a grouped and a transposed convolution; it gives no classes."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1),
    )  # fmt: skip


TOKENS = torch.randint(7, (300, 6), generator=Generator().manual_seed(0))
IMAGES = torch.randn(800, 2, 7, 7, generator=Generator().manual_seed(0))


@pytest.mark.parametrize(("make", "data", "share"), [(Words, TOKENS, 0.7), (convolutional, IMAGES, 0.85)])
def test_answers_come_nearer_than_layer_by_layer(make: Any, data: Tensor, share: float) -> None:
    models = seeded(make, 0, 1)
    with torch.no_grad():
        for p in (p for model in models for p in model.parameters() if p.dim() > 1):
            p *= 2  # so that activations matter
    prepared = fxzip.prepare(*models, example_inputs=data[:2]).observe(list(data.split(50)), progress=False)

    def unexplained(steps: int) -> float:
        options = fxzip.RefitOptions(polish=steps)
        fidelity = prepared.convert(method="select", refit=options, progress=False).report.fidelity
        assert fidelity is not None
        return fidelity.unexplained

    assert unexplained(6) < share * unexplained(0)


def test_a_polished_network_computes_what_its_parameters_say_and_the_models_are_left_alone() -> None:
    models = seeded(Words, 0, 1)
    before = copy.deepcopy([model.state_dict() for model in models])
    options = fxzip.RefitOptions(polish=2, rounds=0)
    zipped = fxzip.zip(*models, list(TOKENS.split(50)), method="permute", refit=options, progress=False)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in zipped.parameters())
    assert all(p.requires_grad for p in zipped.parameters())


def test_a_network_that_answers_exactly_stays() -> None:
    (model,) = seeded(Words, 0)
    prepared = fxzip.prepare(model, copy.deepcopy(model), example_inputs=TOKENS[:2])
    prepared.observe(list(TOKENS.split(50)), progress=False)
    plan = prepared.plan(method="average")
    parts = split(plan)
    before = {name: p.detach().clone() for name, p in parts.trunk.named_parameters()}
    polish(parts, plan, [Given((TOKENS,), {})], fxzip.RefitOptions(polish=3), progress=False)
    assert all(torch.allclose(p, before[name], atol=1e-4) for name, p in parts.trunk.named_parameters())


def test_worse_than_before_on_images_held_back_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    models = seeded(Words, 0, 1)
    prepared = fxzip.prepare(*models, example_inputs=TOKENS[:2]).observe(list(TOKENS.split(50)), progress=False)

    def spoil(parts: Any, *_: Any) -> int:
        with torch.no_grad():
            for p in parts.trunk.parameters():
                p.mul_(3)
        return 1

    plain = prepared.convert(method="permute", progress=False)
    monkeypatch.setattr("fxzip.fitted.polish", spoil)
    spoiled = prepared.convert(method="permute", refit=fxzip.RefitOptions(polish=1), progress=False)
    for one, other in zip(plain(TOKENS[:4]), spoiled(TOKENS[:4]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("make", "data"), [(Words, TOKENS), (convolutional, IMAGES)])
def test_the_gradient_is_that_of_the_error(make: Any, data: Tensor) -> None:
    network, goal = _network(make, data)
    found = Curvature.of(network, goal, goal.places, Generator().manual_seed(0))
    tensors = parameters(network)
    ways = [torch.randn(p.shape, generator=Generator().manual_seed(n), dtype=p.dtype) for n, p in enumerate(tensors)]
    expected = sum(float((g * w).sum()) for g, w in zip(found.gradient, ways, strict=True))
    errors = []
    for size in (1e-6, -1e-6):
        with torch.no_grad():
            for p, way in zip(tensors, ways, strict=True):
                p += size * way
            errors.append(sum(goal.error(place, network.outputs(goal.images[place])) for place in goal.places))
            for p, way in zip(tensors, ways, strict=True):
                p -= size * way
    assert (errors[0] - errors[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


def _network(make: Any, data: Tensor) -> tuple[Network, Goal]:
    models = [model.double() for model in seeded(make, 0, 1)]
    data = data.double() if data.is_floating_point() else data
    prepared = fxzip.prepare(*models, example_inputs=data[:2]).observe([data], progress=False)
    plan = prepared.plan(method="permute")
    parts = split(plan)
    network = Network(parts.trunk, dict(enumerate(parts.heads)))
    for p in parameters(network):
        p.requires_grad_(True)
    return network, Goal(dict(enumerate(plan.alignment.modules)), in_parts([Given((data[:200],), {})]), 2**20)


def test_every_layer_has_a_curvature_and_the_rest_is_polished_too() -> None:
    network, _ = _network(Words, TOKENS)
    assert [layer.node.name for layer in network.layers] == ["up", "down", "out", "out"]
    assert {tuple(p.shape) for p in network.others} == {(7, 12), (12,)}
    matrix = network.layers[0].packed([p.detach() for p in network.layers[0].parameters])
    assert matrix.shape == (1, 24, 13)
    for p, back in zip(network.layers[0].parameters, network.layers[0].unpacked(matrix), strict=True):
        assert torch.equal(p, back)


@pytest.mark.parametrize("classes", [None, 1])
def test_probes_and_roots_have_the_curvature_of_the_error(classes: int | None) -> None:
    g = Generator().manual_seed(0)
    wanted, has = (torch.randn(1, 4, generator=g, dtype=torch.float64) for _ in range(2))
    distance = Distance(0.7, classes)

    def error(x: Tensor) -> Tensor:
        if classes is None:
            return 0.7 * (x - wanted).square().sum()
        target = wanted.log_softmax(1)
        return 0.7 * (target.exp() * (target - x.log_softmax(1))).sum()

    assert distance.error(wanted, has) == pytest.approx(float(error(has)))
    curvature: Tensor = torch.autograd.functional.hessian(error, has).reshape(4, 4)
    probes = torch.stack([distance.probe(has, g)[0] for _ in range(20_000)])
    assert torch.allclose(probes.T @ probes / len(probes), curvature, atol=0.03)
    roots = torch.stack([distance.root(way[None], has) for way in torch.eye(4, dtype=torch.float64)])
    assert torch.allclose(roots @ roots.T, curvature)
    gradient = torch.autograd.functional.jacobian(error, has)
    assert torch.allclose(distance.gradient(wanted, has), gradient)


def test_an_output_that_does_not_vary_does_not_count() -> None:
    variation = Variation(None)
    variation.add(torch.full((5, 3), 0.3))
    assert variation.distance(1.0) is None


def test_what_cannot_be_differentiated_is_said_and_stays_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = fxzip.prepare(*seeded(Words, 0, 1), example_inputs=TOKENS[:2])
    prepared.observe(list(TOKENS.split(50)), progress=False)

    def without_backward(*_: Any, **__: Any) -> Any:
        raise RuntimeError("derivative for own::step is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", without_backward)
    options = fxzip.RefitOptions(polish=2, rounds=0)
    with pytest.warns(UserWarning, match="polish ends, as the network cannot be differentiated: .*own::step"):
        polished = prepared.convert(method="permute", refit=options, progress=False)
    monkeypatch.undo()
    plain = prepared.convert(method="permute", refit=fxzip.RefitOptions(rounds=0), progress=False)
    for one, other in zip(plain(TOKENS), polished(TOKENS), strict=True):
        assert torch.equal(one, other)


def test_stems_stay_as_the_models_have_them() -> None:
    models = seeded(convolutional, 0, 1)
    options = fxzip.RefitOptions(polish=2, rounds=0)
    prepared = fxzip.prepare(*models, example_inputs=IMAGES[:2]).observe([IMAGES[:200]], progress=False)
    zipped = prepared.convert(start="2", method="permute", refit=options, progress=False)
    state = zipped.trunk.state_dict()
    for number, model in enumerate(models):
        assert torch.equal(state[f"stem{number}.0.weight"], model.get_parameter("0.weight"))
