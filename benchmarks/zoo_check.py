"""One model of the zoo under the exact oracles: ``python -m benchmarks.zoo_check timm:resnet18``.

The row is written after each step, so that what was found is not lost where a step takes too long.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.lib.command import CommandLine
from benchmarks.lib.zoo_check import STEPS, WITH_WEIGHTS, check_to_file


def main() -> None:
    """Check the model, and print its row."""
    line = CommandLine(__doc__)
    line.parser.add_argument("name", help="such as timm:resnet18")
    line.parser.add_argument("--out", type=Path, default=Path("row.json"), help="default: %(default)s")
    line.parser.add_argument("--steps", nargs="+", choices=STEPS, default=WITH_WEIGHTS, help="default: all but fake")
    options = line.read()
    check_to_file(options.name, options.steps, options.out)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
