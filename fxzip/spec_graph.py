"""Channel spaces, the layers on them and their merge points as a graph of networkx.

Nodes are pairs of a kind and a name, since a space has the name of the layer that produces it first:

| node                | what it is                                     | attributes                          |
| ------------------- | ---------------------------------------------- | ----------------------------------- |
| ``("space", name)`` | a channel space                                | ``size``: channels                  |
| ``("layer", name)`` | a module that owns parameters on spaces        | ``parameters``: their names         |
| ``("point", name)`` | a traced node whose output is observed         | ``axes``: where its channels lie    |

All nodes have ``kind`` and ``label`` (the name), too. A parameter of the network itself is a layer of its own name.

| edge           | ``role``     | what it says                                                                     |
| -------------- | ------------ | -------------------------------------------------------------------------------- |
| layer -> space | ``produce``  | the layer makes these channels, or has a scale, shift or statistic for each      |
| space -> layer | ``contract`` | the layer's weights take these channels in                                       |
| space -> space | ``inside``   | these channels lie in blocks (groups, heads) that are the channels of the second |
| space -> point | ``observed`` | the map of the space is decided by what is seen there                            |

So paths follow what the network computes, as far as channels go; a residual stream is a cycle. Edges between layers
and spaces have ``parameters``, too: the names of those that the edge is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from networkx import DiGraph

from fxzip.channels import ChannelSpec, MergePoint, Site

Name = tuple[str, str]


def spec_graph(spec: ChannelSpec, points: Mapping[str, Sequence[MergePoint]]) -> DiGraph:
    """The graph of a network's spaces.

    Args:
        spec: The spaces.
        points: Merge points by space, for those that should be shown.
    """
    graph = DiGraph()
    for space in spec.spaces:
        _add(graph, ("space", space.name), size=space.size)
    for space in spec.spaces:
        here = ("space", space.name)
        for site in space.sites:
            _add_site(graph, here, site)
        if space.parent is not None:
            graph.add_edge(here, ("space", space.parent), role="inside")
        for point in points.get(space.name, ()):
            graph.add_edge(here, _add(graph, ("point", point.node), axes=point.axes), role="observed")
    return graph


def _add_site(graph: DiGraph, space: Name, site: Site) -> None:
    """A layer, and the edge that one of its parameters makes."""
    layer = ("layer", site.parameter.rpartition(".")[0] or site.parameter)
    known = graph.nodes.get(layer, {}).get("parameters", ())
    _add(graph, layer, parameters=_with(known, site.parameter))
    ends = (layer, space) if site.role == "produce" else (space, layer)
    named = graph.get_edge_data(*ends, default={}).get("parameters", ())
    graph.add_edge(*ends, role=site.role, parameters=_with(named, site.parameter))


def _add(graph: DiGraph, node: Name, **attributes: object) -> Name:
    graph.add_node(node, kind=node[0], label=node[1], **attributes)
    return node


def _with(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return names if name in names else (*names, name)
