"""Fill README.md's tables with the benchmarks' results: ``python -m benchmarks.tables``.

The docs get theirs when they are built. How tables are marked stands in `benchmarks.lib.tables`.
"""

from __future__ import annotations

from benchmarks.lib.command import CommandLine
from benchmarks.lib.tables import ROOT, fill


def main() -> None:
    """Write README.md again."""
    CommandLine(__doc__).read()
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
