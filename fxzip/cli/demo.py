"""``fxzip demo``."""

from __future__ import annotations

from fxzip.cli import options as shared
from fxzip.cli import parameters as p
from fxzip.errors import OptionError


def demo(json_path: p.JsonPath = None, quiet: p.Quiet = False, debug: p.Debug = False) -> None:
    """Train two small ResNets on digits 0-4 and 5-9, merge them, and print how much accuracy the merges keep."""
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise OptionError(f"--json: the folder {json_path.resolve().parent} does not exist")
    from rich.console import Console

    from fxzip import demo as digits

    rows = digits.run(progress=not quiet)
    Console(width=max(Console().width, 90)).print(digits.table(rows))  # not a column less, even into a pipe
    if json_path is not None:
        shared.write_json(json_path, digits.as_json(rows))
