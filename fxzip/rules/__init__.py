"""Rules of operations, by kind; importing this package registers them all."""

from fxzip.rules import contractions, elementwise, movement, norms, products, reductions
from fxzip.rules.registry import (
    RuleContext,
    Unsupported,
    find_rule,
    kind_of,
    register_rule,
    target_of,
    unregister_rule,
)

__all__ = [
    "RuleContext",
    "Unsupported",
    "contractions",
    "elementwise",
    "find_rule",
    "kind_of",
    "movement",
    "norms",
    "products",
    "reductions",
    "register_rule",
    "target_of",
    "unregister_rule",
]
