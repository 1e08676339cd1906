"""Trace: a model becomes a torch.fx graph of torch's own modules, functions and parameters."""

from fxzip.passes.trace.copies import eval_copy, unwrap
from fxzip.passes.trace.trace import trace

__all__ = ["eval_copy", "trace", "unwrap"]
