"""Models that came through torch.export are merged as the models that they were made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxzip
from tests.nets import Net, conv
from tests.oracles import call, difference, images, randomise

X = images(48, 6)


def in_place(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x.relu_()
    x += 1
    return m.head(F.relu(m.b(x)).mean((2, 3)))


def plain(m: Net, x: Tensor) -> Tensor:
    return m.head(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def network(function: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Net(function, a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 3)), X, seed)


def exported(net: nn.Module) -> fx.GraphModule:
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (X[:4],), dynamic_shapes=({0: batch},), strict=False)
    return program.module(check_guards=False)


@pytest.mark.parametrize("function", [in_place, plain], ids=lambda f: f.__name__)
def test_a_merge_with_its_own_copy_is_exact_at_every_cut(function: object) -> None:
    """Writes in place (``relu_``, ``+= 1``) were once lost by the heads, and the merge was off by its own size."""
    net = network(function)
    graph = exported(net)
    prepared = fxzip.prepare(graph, exported(net), example_inputs=X, verify=False).observe([X], progress=False)
    assert len(prepared.cuts) > 4
    for cut in (0.0, None, *prepared.cuts):
        zipped = prepared.convert(cut=cut, refit=False, reset_batch_norm=False, verify=False, progress=False)
        for output in zipped(X):
            assert difference(call(net, X), output) < 1e-9, cut
    assert difference(call(net, X), call(graph, X)) < 1e-12  # the user's graph is as it was


@pytest.mark.parametrize("function", [in_place, plain], ids=lambda f: f.__name__)
def test_refit_knows_a_relu_of_aten(function: object) -> None:
    """Fits before a ReLU are one-sided; an exported graph's ReLU was once overlooked."""
    nets = [network(function, seed) for seed in (0, 1)]
    merged = fxzip.zip(*nets, [X], progress=False)
    again = fxzip.zip(*map(exported, nets), [X], progress=False)
    assert merged.report.refitted == again.report.refitted
    assert difference(merged(X), again(X)) < 1e-5
