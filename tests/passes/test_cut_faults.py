"""Cuts at which a merge would be wrong are no cuts, and the default avoids what cannot be merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxzip
from tests.nets import Net, conv
from tests.oracles import call, difference, images, randomise

X = images(64, 6)

SPREAD = {
    "halves swapped": lambda v: torch.cat(v.chunk(2, 1)[::-1], 1),
    "split in uneven parts": lambda v: torch.cat(v.split([2, 6], 1)[::-1], 1),
    "unbound": lambda v: torch.stack(v.unbind(1)[::-1], 1),
    "maxout": lambda v: torch.cat([torch.maximum(*v.chunk(2, 1)), v[:, :4]], 1),
    "stacked": lambda v: torch.stack(v.chunk(2, 1), 1).flatten(1, 2),
    "one half twice": lambda v: torch.cat([v[:, :4], v], 1),
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_cut_that_part_of_a_space_crosses_is_none(name: str) -> None:
    """At every cut that is left a network and its permuted copy merge into both."""
    spread = SPREAD[name]
    width = spread(torch.zeros(1, 8, 1, 1)).shape[1]

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(m.b(F.softplus(spread(m.a(x)))).mean((2, 3)))

    net = randomise(Net(forward, a=conv(3, 8), b=conv(width, 5), head=nn.Linear(5, 3)), X)
    prepared = fxzip.prepare(net, fxzip.analyse(net, X).permute(net), example_inputs=X).observe([X], progress=False)
    assert {"a", "b"} <= set(prepared.cuts)
    for cut in (0.0, None, *prepared.cuts):
        zipped = prepared.convert(cut=cut, method="permute", refit=False, reset_batch_norm=False, progress=False)
        for output in zipped(X):
            assert difference(call(net, X), output) < 1e-6, cut


class Recurrent(nn.Module):
    """Two layers, and a recurrent one of which no rule says what its units are."""

    def __init__(self, kind: type[nn.RNNBase], first: bool = False) -> None:
        super().__init__()
        self.front = nn.Identity() if first else nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 5))
        self.recurrent = kind(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.front(x))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_left_to_the_heads(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0))
    zipped = fxzip.zip(Recurrent(kind), Recurrent(kind), [x], progress=False)
    assert "recurrent.weight_hh_l0" not in zipped.trunk.state_dict()
    assert "recurrent.weight_hh_l0" in zipped.heads["task1"].state_dict()
    with pytest.raises(fxzip.CutError, match=f"no rule for the {kind.__name__} recurrent"):
        fxzip.zip(Recurrent(kind, first=True), Recurrent(kind, first=True), [x], progress=False)


class Queries(nn.Module):
    """Learned queries, as they are or projected, that attend to the input's tokens."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(4, 8))
        self.embed, self.query = nn.Linear(3, 8), nn.Linear(8, 8) if projected else nn.Identity()
        self.key_value, self.head = nn.Linear(8, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key_value(self.embed(x)).chunk(2, -1)
        query = self.query(self.tokens).expand(x.shape[0], -1, -1)
        return self.head((query + (query @ key.mT).softmax(-1) @ value).mean(1))


@pytest.mark.parametrize("projected", [False, True])
def test_learned_queries_are_merged(projected: bool) -> None:
    x = torch.randn(64, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = randomise(Queries(projected), x)
    prepared = fxzip.prepare(net, fxzip.analyse(net, x).permute(net), example_inputs=x).observe([x], progress=False)
    for cut in (0.0, None, *prepared.cuts):
        for refit in (False, True):
            outputs = prepared.convert(cut=cut, method="permute", refit=refit, progress=False)(x)
            assert max(difference(call(net, x), output) for output in outputs) < (1e-3 if refit else 1e-6), cut
