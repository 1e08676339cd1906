"""The command line of all benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.lib.runs import RESULTS


class CommandLine:
    """Options of a command, each of which is declared here in one way.

    Attributes:
        parser: What they are added to; a command may add some of its own.
    """

    def __init__(self, description: str | None) -> None:
        """Begin with what the command says of itself."""
        form = argparse.RawDescriptionHelpFormatter
        self.parser = argparse.ArgumentParser(description=description, formatter_class=form)

    def numbers(self, help: str | None = None, **defaults: int) -> CommandLine:
        """An option for each whole number."""
        for name, default in defaults.items():
            text = "default: %(default)s"
            self.parser.add_argument(f"--{name}", type=int, default=default, help=f"{help}; {text}" if help else text)
        return self

    def several(self, name: str, known: Iterable[str], help: str | None = None) -> CommandLine:
        """An option for some of what is known; all of it by default."""
        names = list(known)
        self.parser.add_argument(f"--{name}", nargs="+", choices=names, default=names, help=help)
        return self

    def pairs(self, count: int) -> CommandLine:
        """``--pairs``, the numbers of the pairs; the first so many by default."""
        help = "numbers of the pairs of networks; default: %(default)s"
        self.parser.add_argument("--pairs", nargs="+", type=int, default=list(range(count)), help=help)
        return self

    def training(self) -> CommandLine:
        """``--data`` and ``--bf16``, of commands that train networks."""
        text = "train under bfloat16 autocast (the default where the CPU has instructions for it)"
        bf16 = torch.cpu._is_avx512_bf16_supported()
        self.parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help=text)
        return self.data("a folder with the packed data sets, or torchvision's")

    def data(self, help: str) -> CommandLine:
        """``--data``, which must be given."""
        self.parser.add_argument("--data", type=Path, required=True, help=help)
        return self

    def results(self, benchmark: str) -> CommandLine:
        """``--json``, where the results go."""
        path = RESULTS / f"{benchmark}.json"
        self.parser.add_argument("--json", type=Path, default=path, help="where the results go; default: %(default)s")
        return self

    def read(self) -> argparse.Namespace:
        """What the user chose; PyTorch computes on ``--threads`` from now on, on one where there is no such option."""
        options = self.parser.parse_args()
        torch.set_num_threads(getattr(options, "threads", 1))
        return options
