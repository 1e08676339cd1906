"""Commands that take what ``fxzip zip`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxzip.cli.merge import zip_models


def like_zip(
    command: Any,
    *,
    without: Iterable[str],
    other: Mapping[str, Callable[[inspect.Parameter], inspect.Parameter]] = {},
    more: Iterable[inspect.Parameter] = (),
) -> None:
    """Give a command the options of ``fxzip zip``.

    Args:
        command: A function of a context and keywords.
        without: The options that it has not.
        other: What makes some options of it from those of ``zip``, by name.
        more: Options of its own.
    """
    own = dict(inspect.signature(zip_models, eval_str=True).parameters)
    for name in without:
        del own[name]
    own |= {name: change(own[name]) for name, change in other.items()}
    parameters = [*own.values(), *more]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
