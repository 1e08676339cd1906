"""Counting floating-point operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class _NoModules:
    """In place of the counter's look at modules, which wants a gradient of whatever says that it needs one.

    An expanded parameter says so even without gradients (`torch.no_grad`), and has none.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of the operations of all modules together, and attention on a CPU, which it leaves out."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    left_out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={left_out: attention})
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter
