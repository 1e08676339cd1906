"""The graph of spaces and layers: what it says of a network whose structure is known."""

from __future__ import annotations

import networkx
import pytest
import torch
from torch import nn

import fxzip
from tests.nets import Residual, pair
from tests.oracles import images

X = images(4, 8)


@pytest.fixture(scope="module")
def prepared() -> fxzip.Prepared:
    return fxzip.prepare(*pair(Residual, X), example_inputs=X).observe([X], progress=False)


def test_a_chain_of_layers_is_a_path() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = fxzip.analyse(model, torch.zeros(2, 4)).graph()
    first, last = ("layer", "0"), ("layer", "4")
    path = [first, ("space", "0"), ("layer", "2"), ("space", "2"), last]
    assert set(graph) == set(path)
    assert networkx.shortest_path(graph, first, last) == path
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.nodes["space", "0"] == {"kind": "space", "label": "0", "size": 8}
    assert graph.nodes["layer", "2"]["parameters"] == ("2.weight", "2.bias")
    assert graph.edges[first, ("space", "0")] == {"role": "produce", "parameters": ("0.weight", "0.bias")}
    assert graph.edges[("space", "0"), ("layer", "2")] == {"role": "contract", "parameters": ("2.weight",)}


def test_every_site_is_an_edge_and_a_residual_stream_a_cycle(prepared: fxzip.Prepared) -> None:
    graph = prepared.spec.graph()
    sites = {(s.name, site.parameter, site.role) for s in prepared.spec.spaces for site in s.sites}
    found = set()
    for a, b, edge in graph.edges(data=True):
        space = b if edge["role"] == "produce" else a
        found |= {(space[1], parameter, edge["role"]) for parameter in edge.get("parameters", ())}
    assert found == sites
    stream = next(b for _, b in graph.out_edges(("layer", "stem")))
    assert any(stream in part and len(part) > 1 for part in networkx.strongly_connected_components(graph))


def test_merge_points_are_shown_where_they_are_given(prepared: fxzip.Prepared) -> None:
    graph = prepared.spec.graph(prepared.points)
    shown = {name: [b[1] for _, b in graph.out_edges(("space", name)) if b[0] == "point"] for name in prepared.points}
    assert shown == {name: [point.node for point in points] for name, points in prepared.points.items()}
    assert not [node for node in prepared.spec.graph() if node[0] == "point"]


def test_blocks_are_inside_their_space() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(1), nn.LazyLinear(3))
    model(torch.zeros(1, 3, 5, 5))
    spec = fxzip.analyse(model, torch.zeros(2, 3, 5, 5))
    inside = {(a[1], b[1]) for a, b, role in spec.graph().edges(data="role") if role == "inside"}
    assert inside == {(space.name, space.parent) for space in spec.spaces if space.parent}
    assert inside
