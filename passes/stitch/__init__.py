"""Stitch: networks that share nothing; one goes on from the other's features, through a linear map."""

from fxzip.passes.stitch.seams import Seam, Wanted, seams
from fxzip.passes.stitch.spots import Spot, Spots, find_spots
from fxzip.passes.stitch.weave import head_of, weave

__all__ = ["Seam", "Spot", "Spots", "Wanted", "find_spots", "head_of", "seams", "weave"]
