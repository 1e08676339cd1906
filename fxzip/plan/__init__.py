"""The plan: a merged network as plain JSON, from which it is built without the classes that it came from.

A plan may come from anywhere, so reading one can only put together what this package lists: calls of known,
harmless functions (`targets`), arguments of plain types (`values`), torch.nn's own layers (`layers`), and
names that are identifiers (`graphs`). A bad plan can waste memory or time, and never runs code.
"""

from fxzip.plan.graphs import read_graph, write_graph
from fxzip.plan.records import read_record, write_record
from fxzip.plan.state import read_state, write_state
from fxzip.plan.values import decode, encode

__all__ = [
    "decode",
    "encode",
    "read_graph",
    "read_record",
    "read_state",
    "write_graph",
    "write_record",
    "write_state",
]
