"""Rules of operations, by kind; importing this package registers them all."""

from fxzip.rules import contractions, elementwise, movement, norms, patches, products, reductions, sizes
from fxzip.rules.calls import Call, Joint, Linear, Norm, product
from fxzip.rules.registry import (
    RuleContext,
    Unsupported,
    find_entry,
    find_rule,
    kind_of,
    register_rule,
    target_of,
    unregister_rule,
)

__all__ = [
    "Call",
    "Joint",
    "Linear",
    "Norm",
    "RuleContext",
    "Unsupported",
    "contractions",
    "elementwise",
    "find_entry",
    "find_rule",
    "kind_of",
    "movement",
    "norms",
    "patches",
    "product",
    "products",
    "reductions",
    "register_rule",
    "sizes",
    "target_of",
    "unregister_rule",
]
