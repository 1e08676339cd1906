"""What one call of a saved graph may ask for, by its arguments alone: looked at before the call is run."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fxzip.errors import FileFormatError
from fxzip.plan.values import words

MOST_PIECES = 1 << 16
"""The most tensors that one operation may give."""

_MOST = 1 << 63
_GROWING = frozenset(
    words("""
arange broadcast_to constant_pad_nd expand eye full interpolate linspace new_full new_ones new_zeros normal one_hot
ones pad rand randint randn randperm repeat repeat_interleave tile tril_indices triu_indices upsample zeros
""")
)
_SPLITS = frozenset(words("chunk dsplit hsplit split split_with_sizes tensor_split unbind vsplit"))
_OF_TEXTS = frozenset(words("einsum eq ge getitem gt le lt ne not_ __len__ len size dim numel"))
"""What may take a text or a dict first."""


class Unknown:
    """A value that depends on inputs of which no example is known."""

    def __repr__(self) -> str:
        return "an unknown value"


UNKNOWN = Unknown()


def check_call(name: str, args: tuple[Any, ...], leaves: list[Any]) -> None:
    """Refuse, before it is run, what takes long or much without a tensor, and tensors in too many pieces."""
    plain = name.strip("_")
    if isinstance(args[0] if args else None, (str, dict)) and plain not in _OF_TEXTS:
        raise FileFormatError(f"it calls {name} on a text or a dict, which a saved graph may not")
    if plain in ("mul", "imul", "rmul", "pow", "rpow", "ipow", "lshift") and not any(
        isinstance(leaf, (Tensor, Unknown)) for leaf in leaves
    ):
        _check_arithmetic(plain, args)
    if plain in ("div", "divide") and "trunc" in leaves and not any(map(_is_fractional, leaves)):
        raise FileFormatError(
            f"{name} of whole numbers with rounding_mode='trunc' stops the process where it overflows: use 'floor'"
        )
    if plain in _GROWING and any(isinstance(leaf, Unknown) for leaf in leaves):
        sizes = [abs(leaf) for leaf in leaves if type(leaf) is int and leaf]
        if math.prod(sizes) > 1 << 31:
            raise FileFormatError(f"{name} makes a tensor of at least {math.prod(sizes):,} times its input's size")
    if plain in _SPLITS and args and isinstance(args[0], Tensor):
        pieces = max((1, *args[0].shape))
        if plain == "split" and len(args) > 1 and isinstance(args[1], int):
            pieces //= max(args[1], 1)
        if pieces > MOST_PIECES and not (plain in ("chunk", "tensor_split") and leaves[1] in range(MOST_PIECES)):
            raise FileFormatError(f"{name} may give {pieces:,} tensors, more than {MOST_PIECES:,}")


def _is_fractional(value: Any) -> bool:
    """Whether a division by or of a value is not one of whole numbers, as far as is known."""
    return isinstance(value, (float, Unknown)) or (isinstance(value, Tensor) and value.is_floating_point())


def _check_arithmetic(name: str, args: tuple[Any, ...]) -> None:
    """Powers, shifts and repeated lists."""
    left, right = (*args, 0, 0)[:2]
    if name.startswith("r"):
        left, right = right, left
    if isinstance(left, (list, tuple)) or isinstance(right, (list, tuple)):
        parts, count = (left, right) if isinstance(left, (list, tuple)) else (right, left)
        if not isinstance(count, int) or len(parts) * count > MOST_PIECES:
            raise FileFormatError(f"it repeats a list {count} times")
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and name in ("pow", "ipow") and abs(left) > 1 and right * math.log2(abs(left)) > 63:
        raise FileFormatError(f"{left} to the power of {right} does not fit into 64 bits")
    if whole and name == "lshift" and right > 63:
        raise FileFormatError(f"{left} shifted by {right} does not fit into 64 bits")


def check_number(value: Any) -> None:
    """Refuse a number or a text, made by a call, that is too long."""
    if isinstance(value, int) and not -_MOST <= value < _MOST:
        raise FileFormatError("it gives a number that does not fit into 64 bits")
    if isinstance(value, str) and len(value) > MOST_PIECES:
        raise FileFormatError("it gives a text that is too long")
