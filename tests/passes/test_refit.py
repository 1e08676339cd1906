"""Refit against plain least squares, where it must be exact, and where there is little to go by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.refit import RefitOptions, regression
from fxzip.passes.refit.fitting import Fit, Fitter
from fxzip.passes.refit.pairs import Pair
from fxzip.passes.refit.regression import Regression, Residuals
from fxzip.passes.refit.units import Unit, find_units
from fxzip.passes.trace import trace
from tests.nets import Net, Residual, conv, pair, permuted_copy
from tests.oracles import call, difference, images, randomise

X = images(24, 12)


def left_by(x: Tensor, t: Tensor, weights: Tensor, bias: Tensor, parts: int = 1) -> Residuals:
    """What weights and a bias leave to explain of t."""
    found = Residuals()
    for part_x, part_t in zip(x.chunk(parts, 2), t.chunk(parts, 2), strict=True):
        left = part_t - weights @ part_x - bias[:, :, None]
        found.add(left.shape[2], left @ part_x.mT, left.sum(2), part_x.sum(2))
    return found


def solved(x: Tensor, t: Tensor, prior: Tensor, ridge: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Weights and a bias by one step from the prior."""
    regression, bias = Regression(intercept), torch.zeros(prior.shape[:2], dtype=prior.dtype)
    for part in x.split(15, 2):
        regression.add(part)
    change, shift = regression.step(left_by(x, t, prior, bias, parts=3), ridge)
    return prior + change, bias + shift


def test_a_step_with_the_gram_matrix_of_all_samples_is_the_least_squares_solution() -> None:
    x = torch.randn(3, 5, 40, dtype=torch.float64) + 100
    t = torch.randn(3, 2, 40, dtype=torch.float64) - 50
    weights, bias = solved(x, t, torch.zeros(3, 2, 5, dtype=torch.float64), ridge=0.0)
    for group in range(3):
        columns = torch.cat([x[group], torch.ones(1, 40)]).T
        best = torch.linalg.lstsq(columns, t[group].T).solution.T
        assert torch.allclose(weights[group], best[:, :5], atol=1e-6)
        assert torch.allclose(bias[group], best[:, 5], atol=1e-4)


def test_steps_with_the_gram_matrix_of_some_samples_come_to_the_same() -> None:
    x, t = torch.randn(2, 5, 400, dtype=torch.float64) + 3, torch.randn(2, 2, 400, dtype=torch.float64)
    prior = torch.randn(2, 2, 5, dtype=torch.float64)
    regression, weights, bias = Regression(), prior, prior.new_zeros(2, 2)
    regression.add(x[..., ::4])
    wanted = solved(x, t, prior, ridge=0.1)[0]
    errors = []
    for _ in range(6):
        change, shift = regression.step(left_by(x, t, weights, bias), 0.1, back=prior - weights)
        weights, bias = weights + change, bias + shift
        errors.append(float((weights - wanted).norm() / (wanted - prior).norm()))
    assert errors[0] < 0.3, errors
    assert errors[1] < 0.5 * errors[0], errors
    assert errors[-1] < 0.02, errors


def test_sums_in_slices_and_panels_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = torch.randn(2, 700, 90, dtype=torch.float64), torch.randn(2, 3, 90, dtype=torch.float64)
    prior = torch.zeros(2, 3, 700, dtype=torch.float64)
    whole = x @ torch.linalg.inv(x.mT @ x + 1e-3 * x.square().sum(2).mean(1)[:, None, None] * torch.eye(90))
    for size in (regression._SLICE, 2 * 700 * 7):
        monkeypatch.setattr(regression, "_SLICE", size)
        weights, bias = solved(x, t, prior, ridge=1e-3, intercept=False)
        assert torch.allclose(weights, t @ whole.mT, atol=1e-6)
        assert not bias.any()


def test_the_ridge_holds_to_the_prior() -> None:
    x, t = torch.randn(1, 5, 40, dtype=torch.float64), torch.randn(1, 2, 40, dtype=torch.float64)
    prior = torch.randn(1, 2, 5, dtype=torch.float64)
    assert torch.allclose(solved(x, t, prior, ridge=1e9)[0], prior, atol=1e-6)
    assert torch.allclose(solved(x[..., :2], prior @ x[..., :2], prior, ridge=1e-3)[0], prior, atol=1e-9)
    assert torch.equal(solved(torch.zeros_like(x), t, prior, ridge=0.0)[0], prior)


def branches(m: Net, x: Tensor) -> Tensor:
    x = m.norm(m.a(x)).relu()
    x = (m.norm_b(m.b(x)) + m.norm_c(m.c(x)) + m.norm_x(x)).relu()
    return m.head(x.mean((2, 3)))


def wide() -> Net:
    norms = {f"norm{end}": nn.BatchNorm2d(8) for end in ("", "_b", "_c", "_x")}
    return Net(branches, a=conv(3, 8), b=conv(8, 8), c=nn.Conv2d(8, 8, 1), head=nn.Linear(8, 5), **norms)


def test_layers_that_end_in_one_sum_are_one_unit() -> None:
    module = canonicalise(trace(randomise(wide(), X), (X,)))
    units = {unit.root.name: unit for unit in find_units(module)}
    (joint,) = [unit for unit in units.values() if len(unit.layers) > 1]
    assert [layer.weight for layer in joint.layers] == ["b.weight", "c.weight"]
    assert [len(layer.chain) for layer in joint.layers] == [1, 1]
    assert [node.target for node in joint.known] == ["norm_x"]
    assert len(units) == 3


@pytest.mark.parametrize("make", [Residual, wide])
@pytest.mark.parametrize("cut", [None, 0.5])
def test_what_is_exact_stays_exact(make: type[nn.Module], cut: float | None) -> None:
    model = randomise(make(), X)
    other = permuted_copy(model, X)
    zipped = fxzip.zip(model, other, [X], method="permute", cut=cut, hold_back=False, progress=False)
    assert zipped.report.refitted > 0
    for expected, out in zip((call(model, X), call(other, X)), call(zipped, X), strict=True):
        assert difference(expected, out) < 1e-4


def mixer(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x.flatten(2).transpose(1, 2))
    x = m.tokens2(m.tokens(x.transpose(1, 2)).relu()).transpose(1, 2).relu()
    return m.head(m.channels(x).relu().mean(1))


def test_values_with_tokens_and_channels_are_merged_along_both() -> None:
    x = images(24, 3)
    layers = {"stem": nn.Linear(3, 8), "tokens": nn.Linear(9, 6), "tokens2": nn.Linear(6, 5)}
    model = randomise(Net(mixer, **layers, channels=nn.Linear(8, 8), head=nn.Linear(8, 4)), x)
    other = permuted_copy(model, x)
    zipped = fxzip.zip(model, other, [x], method="permute", hold_back=False, progress=False)
    assert zipped.report.refitted == 6
    for expected, out in zip((call(model, x), call(other, x)), call(zipped, x), strict=True):
        assert difference(expected, out) < 1e-4


@pytest.mark.parametrize("make", [Residual, wide])
def test_refit_is_closer_to_the_parents_than_the_papers_rule(make: type[nn.Module]) -> None:
    models = pair(make, X)
    prepared = fxzip.prepare(*models, example_inputs=X).observe([X[:12], X[12:]], hold_back=False, progress=False)
    wanted = [call(model, X) for model in models]

    def error(refit: bool) -> float:
        outputs = call(prepared.convert(refit=refit, method="zip", progress=False), X)
        return sum(float((a - b).square().mean()) for a, b in zip(wanted, outputs, strict=True))

    assert error(refit=True) < 0.5 * error(refit=False)


def test_the_layers_of_a_head_are_solved_for_their_own_parent() -> None:
    models = pair(Residual, X)
    zipped = fxzip.zip(
        *models, [X], method="zip", refit=fxzip.RefitOptions(ridge=1e-3), hold_back=False, progress=False
    )
    head, fc = zipped.heads["task0"], models[0].fc
    (crossing,) = call(zipped.trunk, X)
    features = crossing.mean((2, 3)) if crossing.dim() == 4 else crossing
    best = torch.linalg.lstsq(torch.cat([features, torch.ones(len(X), 1)], 1), call(models[0], X)).solution
    assert head.fc.weight.shape == fc.weight.shape
    fitted = call(zipped, X)[0]
    ideal = torch.cat([features, torch.ones(len(X), 1)], 1) @ best
    assert (fitted - call(models[0], X)).square().mean() < 1.05 * (ideal - call(models[0], X)).square().mean() + 1e-3


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_do_not_blow_up(count: int) -> None:
    models = pair(Residual, X)
    zipped = fxzip.zip(*models, [X[:count]], method="zip", hold_back=False, progress=False)
    for model, out in zip(models, call(zipped, X), strict=True):
        expected = call(model, X)
        assert bool(out.isfinite().all())
        assert float(out.abs().max()) < 20 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("memory", "read", "taken"), [(0, 2, 2), (2 * X.nbytes, 6, 2), (2**30, 6, 6)], ids=["none", "inputs", "all"]
)
def test_memory_bounds_the_images(memory: int, read: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = fxzip.prepare(*pair(Residual, X), example_inputs=X).observe(X.split(4), hold_back=False, progress=False)
    solve, found = Fitter.solve, []

    def noted(self: Fitter, unit: Unit, pairs: dict[Pair, Fit], rounds: int) -> Fit:
        found.append((len(self.lock.batches), self.lock.active))
        return solve(self, unit, pairs, rounds)

    monkeypatch.setattr(Fitter, "solve", noted)
    prepared.convert(
        refit=RefitOptions(memory=memory, least_images=7),
        method="zip",
        progress=False,
    )
    assert found[0] == (read, taken)


def test_batch_norms_are_folded_away_and_the_models_are_left_alone() -> None:
    models = pair(Residual, X)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    zipped = fxzip.zip(*models, [X], method="zip", hold_back=False, progress=False)
    assert not [m for m in zipped.modules() if isinstance(m, nn.BatchNorm2d)]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("cut", ["layer1.gate", "relu_3", "layer2.norm2"])
def test_what_is_kept_is_found_again_behind_a_cut(cut: str) -> None:
    models = pair(Residual, X)
    prepared = fxzip.prepare(*models, example_inputs=X).observe([X], hold_back=False, progress=False)
    expected = [call(model, X) for model in models]

    def error(refit: bool) -> float:
        zipped = prepared.convert(cut=cut, method="select", refit=refit, progress=False)
        assert any(".unmerge_" in key for key in zipped.state_dict())
        return sum(difference(a, b) for a, b in zip(expected, call(zipped, X), strict=True))

    assert error(refit=True) < error(refit=False)
