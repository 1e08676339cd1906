"""Cut: where the trunk may end and the heads begin, what each place costs, and the plan of a merge."""

from fxzip.passes.cut.budget import on_one_sample, parse_budget, parse_fidelity
from fxzip.passes.cut.cut import Cut, Cuts, classifiers, crossing, find_cuts, is_layer
from fxzip.passes.cut.places import Places, Span, check_span
from fxzip.passes.cut.plan import MergePlan

__all__ = [
    "Cut",
    "Cuts",
    "MergePlan",
    "Places",
    "Span",
    "check_span",
    "classifiers",
    "crossing",
    "find_cuts",
    "is_layer",
    "on_one_sample",
    "parse_budget",
    "parse_fidelity",
]
