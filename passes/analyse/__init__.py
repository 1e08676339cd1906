"""Analyse: the channel spaces of a traced network, found by running its graph on labels."""

from fxzip.passes.analyse.analyse import analyse_graph

__all__ = ["analyse_graph"]
