"""The method and the cut that are found by trial."""

from __future__ import annotations

import copy

import pytest
import torch

import fxzip
from fxzip.errors import CutError, OptionError
from fxzip.fidelity import Answer, Fidelity
from fxzip.passes.choose import candidates, choose, latest, related
from tests.nets import Residual, pair
from tests.oracles import images, randomise

X = images(40, 8)


def of(unexplained: float) -> Fidelity:
    return Fidelity(64, 100, (Answer("task0", "", unexplained),))


def test_the_least_unexplained_wins() -> None:
    shares = {"select": 0.2, "zip": 0.1, "permute": 0.3}
    method, tried = choose(list(shares), lambda name: of(shares[name]))
    assert method == "zip"
    assert [each.method for each in tried] == list(shares)
    assert str(tried[0]) == "select 20.0% unexplained"


def test_the_first_where_nothing_can_be_measured() -> None:
    assert choose(["select", "zip"], lambda _: None) == ("select", ())


def test_the_latest_cut_by_bisection() -> None:
    cuts = [f"layer{k}" for k in range(16)]
    asked: list[str] = []

    def score(cut: str) -> float:
        asked.append(cut)
        return 1 - cuts.index(cut) / 16

    assert latest(cuts, score, 0.5) == "layer8"
    assert len(asked) <= 6
    assert latest(cuts, score, 0.0) == "layer15"
    with pytest.raises(CutError, match="the best that was tried, layer0, keeps 1"):
        latest(cuts, score, 1.5)


def test_fine_tunes_of_one_checkpoint_are_known_by_their_weights() -> None:
    base = randomise(Residual(), X)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.2 * parameter.std().nan_to_num() * noise)
    kin = fxzip.prepare(base, tuned, example_inputs=X[:2])
    assert related(kin.alignment) > 0.9
    assert candidates(kin.alignment, kin.spec)[0] == "average"
    strangers = fxzip.prepare(*pair(Residual, X), example_inputs=X[:2])
    assert abs(related(strangers.alignment)) < 0.3
    assert "average" not in candidates(strangers.alignment, strangers.spec)
    report = kin.observe([X], progress=False).convert(progress=False).report
    assert len(report.tried) == 3
    assert "method chosen from: average" in str(report)


def test_it_takes_no_options_of_a_method() -> None:
    models = pair(Residual, X)
    with pytest.raises(OptionError, match="give method='zip' with it"):
        fxzip.zip(*models, [X], alpha=0.5, progress=False)


def test_it_is_the_same_each_time() -> None:
    models = pair(Residual, X)
    first, second = (fxzip.zip(*models, [X], progress=False).report for _ in range(2))
    assert first.tried == second.tried
    assert first.method == second.method
    assert first.fidelity == second.fidelity
