"""Translation validation: what the analysis has wrong is found, blamed on the right spaces, and kept in place."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzip
from fxzip.channels import ChannelSpec
from fxzip.matching import MergeMap
from fxzip.passes.cut import MergePlan
from fxzip.passes.split.heads import Unmerge
from fxzip.passes.verify import Verifier, ensemble_error, without_spaces
from tests.nets import Net, Residual, conv
from tests.oracles import images, randomise

X = images(4, 8)


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    return fxzip.prepare(randomise(Residual(), X), randomise(Residual(), X, 1), example_inputs=X)


@pytest.fixture
def verifier(prepared: fxzip.Prepared) -> Verifier:
    return Verifier(prepared.alignment.modules[0], prepared.spec.example)


def lacking(spec: ChannelSpec, name: str) -> ChannelSpec:
    """A wrong spec: the last site of a space is missing."""
    spaces = [replace(s, sites=s.sites[:-1]) if s.name == name else s for s in spec.spaces]
    return replace(spec, spaces=tuple(spaces))


def plan_of(prepared: fxzip.Prepared, spec: ChannelSpec, method: str, cut: str | None) -> MergePlan:
    maps = {}
    for space in spec.spaces:
        size = space.size
        kept = torch.arange(size), torch.eye(size, dtype=torch.float64).repeat(2, 1)
        averaged = MergeMap.from_assignment(torch.arange(size).repeat(2), 2)
        maps[space.name] = averaged if method == "average" else MergeMap.from_selection(*kept, 2)
    return MergePlan(prepared.alignment, spec, maps, 0, prepared.place(cut))


def test_what_is_right_passes(prepared: fxzip.Prepared, verifier: Verifier) -> None:
    spec, verified = verifier.checked_spec(prepared.spec)
    assert spec is prepared.spec
    assert verified.permutation < 1e-12
    assert not verified.frozen
    for method in ("average", "select"):
        for cut in (None, *prepared.cuts):
            assert verifier.merge_error(plan_of(prepared, spec, method, cut)) < 1e-12, (method, cut)


def test_the_ensemble_is_the_models(prepared: fxzip.Prepared) -> None:
    assert ensemble_error(prepared.alignment, prepared.spec, prepared.spec.example, prepared.place(0.0)) == 0


def test_a_missing_site_is_found_and_its_space_is_kept_in_place(prepared: fxzip.Prepared, verifier: Verifier) -> None:
    for space in prepared.spec.spaces:
        if space.parent is not None or prepared.spec.children(space.name):
            continue
        wrong = lacking(prepared.spec, space.name)
        with pytest.warns(fxzip.FrozenSpaceWarning, match=f"channels of {space.name} .*are kept in place"):
            fixed, verified = verifier.checked_spec(wrong)
        assert verified.frozen == (space.name,)
        assert {s.name for s in wrong.spaces} - {s.name for s in fixed.spaces} == {space.name}
        assert any(f.name == space.name and "changed the outputs" in f.reason for f in fixed.frozen)
        assert fixed.coverage < wrong.coverage


def test_a_merge_that_does_not_run_is_wrong(
    prepared: fxzip.Prepared, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: nn.Module, inputs: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    plan = plan_of(prepared, prepared.spec, "average", None)
    assert verifier.merge_error(plan) < 1e-12
    monkeypatch.setattr("fxzip.passes.verify.verify.run", fails)
    assert verifier.merge_error(plan) == float("inf")


def test_a_fault_of_the_merge_alone_is_found(
    prepared: fxzip.Prepared, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if split forgot to find the models' channels again where they cross the cut."""
    monkeypatch.setattr(Unmerge, "moves", False)
    plan = plan_of(prepared, prepared.spec, "average", "layer2")
    error = verifier.merge_error(plan)
    assert error > 1e-3
    crossing = {space.name for i in plan.crossing for space, _, _ in plan.spec.locate(plan.name(i))}
    with pytest.warns(fxzip.FrozenSpaceWarning, match="are kept in place"):
        fixed = verifier.without_faults(plan, error)
    assert {s.name for s in plan.spec.spaces} - {s.name for s in fixed.spaces} == crossing
    assert verifier.merge_error(plan_of(prepared, fixed, "average", "layer2")) < 1e-12


def test_frozen_spaces_leave_the_layout_as_it_is_for_others(prepared: fxzip.Prepared) -> None:
    name = prepared.spec.spaces[0].name
    fixed = without_spaces(prepared.spec, prepared.alignment.modules[0], [name], "a reason")
    for node in prepared.spec.layout.factors:
        before = [(s.name, axes, i.tolist()) for s, axes, i in prepared.spec.locate(node) if s.name != name]
        assert [(s.name, axes, i.tolist()) for s, axes, i in fixed.locate(node)] == before


def test_untrained_scales_hide_nothing(prepared: fxzip.Prepared) -> None:
    """A bias of zeros that a spec overlooks would make no difference, were the parameters not changed first."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))

    net = Net(forward, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 2)).double()
    for layer in (net.a, net.b):
        nn.init.zeros_(layer.bias)
    alone = fxzip.prepare(net, net, example_inputs=X)
    (space,) = (s for s in alone.spec.spaces if s.name == "a")
    wrong = replace(space, sites=tuple(s for s in space.sites if s.parameter != "a.bias"))
    spec = replace(alone.spec, spaces=tuple(wrong if s.name == "a" else s for s in alone.spec.spaces))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, verified = Verifier(alone.alignment.modules[0], alone.spec.example).checked_spec(spec)
    assert verified.frozen == ("a",)
