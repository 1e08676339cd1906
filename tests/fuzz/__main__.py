"""Fuzz fxzip: thousands of random networks against exact oracles.

    python -m tests.fuzz --graphs 5000 --seconds 3600 --seed 0 --out .work/fuzz.json

Ends after so many networks or so much time, and goes on where it ended when it is called again with the same file.
What it finds is shrunk and written to the file as a few lines, with the oracle that failed. Network number n of a seed
is always the same one: ``--only n`` checks that one alone and prints it. Exit status: 1 where anything was found.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch._dynamo.config

from tests.fuzz.generate import network
from tests.fuzz.oracles import Check
from tests.fuzz.outcome import Outcome
from tests.fuzz.program import Program
from tests.fuzz.shrink import shrink

EXTRAS = ("refit", "save", "three", "budget", "modules")


def check(
    program: Program, seed: str, extras: tuple[str, ...], verify: bool | None, only: str | None = None
) -> Outcome:
    """All oracles on one network, or what shows one kind of finding; what is random about them comes from the seed."""
    return Check(program, Random(seed), extras, verify, only).run()


def extras_of(number: int) -> tuple[str, ...]:
    """Which of the slower oracles a network is given: two of them."""
    return EXTRAS[number % len(EXTRAS)], EXTRAS[(number // len(EXTRAS) + number + 1) % len(EXTRAS)]


class Run:
    """A run and its file: what was checked, what was found, what is left to shrink."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.state: dict[str, Any] = {"seed": options.seed, "done": 0, "counts": {}, "coverage": [], "findings": []}
        if options.out.exists():
            self.state = json.loads(options.out.read_text())
            if self.state["seed"] != options.seed:
                raise SystemExit(f"{options.out} is of seed {self.state['seed']}; give another file for {options.seed}")

    def left(self) -> float:
        return self.end - time.monotonic()

    def graphs(self) -> None:
        """Check networks until there are enough or time is up."""
        while self.state["done"] < self.options.graphs and self.left() > 0:
            self._one(self.state["done"])
            self.state["done"] += 1
            if self.state["done"] % 10 == 0:
                self.save()
                print(self.summary(), flush=True)
        self.save()

    def _one(self, number: int) -> None:
        seed = f"{self.options.seed}/{number}"
        program = network(Random(seed), self.options.steps, self.options.without)
        outcome = check(program, seed, extras_of(number), self.options.verify)
        counts = Counter(self.state["counts"])
        for what in ("wrong", "raw", "mismatched", "caught", "touched", "frozen"):
            counts[what] += bool(getattr(outcome, what))
        counts["refused"] += outcome.is_refused
        self.state["counts"] = dict(counts)
        if outcome.coverage is not None:
            self.state["coverage"].append(round(outcome.coverage, 4))
        if outcome.findings:
            kinds = sorted(outcome.kinds)
            found = {"number": number, "kinds": kinds, "findings": outcome.findings, "program": str(program)}
            self.state["findings"].append(found)

    def shrink(self) -> None:
        """Shrink what was found, one kind of each finding, until time is up."""
        for found in self.state["findings"]:
            if self.left() < 0 or "shrunk" in found:
                continue
            number, kind = found["number"], _worst(found["kinds"])
            seed = f"{self.options.seed}/{number}"

            def fails(program: Program, number: int = number, kind: str = kind, seed: str = seed) -> bool:
                return kind in check(program, seed, extras_of(number), self.options.verify, kind).kinds

            limit = min(self.left(), self.options.shrink_seconds)
            found["shrunk"] = str(shrink(Program.parse(found["program"]), fails, limit))
            found["kind"] = kind
            self.save()
            print(f"\n{number}: {kind}\n{found['shrunk']}", flush=True)

    def save(self) -> None:
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        new = self.options.out.with_suffix(".new")
        new.write_text(json.dumps(self.state, indent=1))
        os.replace(new, self.options.out)

    def summary(self) -> str:
        """One line: how many networks, and what became of them."""
        done, counts = self.state["done"], self.state["counts"]
        shares = ", ".join(
            f"{what} {counts.get(what, 0)}" for what in ("wrong", "raw", "mismatched", "caught", "refused", "frozen")
        )
        coverage = statistics.median(self.state["coverage"]) if self.state["coverage"] else 0
        return f"{done} graphs: {shares}; median coverage {coverage:.3f}"


_ORDER = ("permutation", "true maps cut=0.0", "true maps", "ensemble", "convert cut=0.0", "convert", "refit", "save")


def _worst(kinds: list[str]) -> str:
    """The kind that says most about the cause."""
    return min(kinds, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))


def _save_time() -> None:
    """Leave out what small graphs do not repay: a quarter of the time.

    Rounds of the garbage collector over all that torch has loaded, and torch's cache of shapes, which lives on layers
    that are repeated.
    """
    torch.set_num_threads(1)
    torch._dynamo.config.fake_tensor_cache_enabled = False
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=5000, help="networks in all (default: 5000)")
    parser.add_argument("--seconds", type=float, default=3600, help="most time to take (default: an hour)")
    parser.add_argument("--seed", default="0", help="of the networks (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(".work/fuzz.json"), help="state and findings")
    parser.add_argument("--steps", type=int, default=8, help="most steps of a network (default: 8)")
    parser.add_argument("--without", nargs="*", default=[], help="steps, or modules of steps (writes), to leave out")
    parser.add_argument("--only", type=int, help="check this network alone, with all oracles, and print it")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="passed on to convert (default: its own)"
    )
    parser.add_argument("--shrink-seconds", type=float, default=60, help="most time for one finding (default: 60)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    _save_time()
    if options.only is not None:
        seed = f"{options.seed}/{options.only}"
        program = network(Random(seed), options.steps, options.without)
        print(program)
        outcome = check(program, seed, EXTRAS, options.verify)
        print(json.dumps(vars(outcome), indent=1))
        return bool(outcome.findings)
    run = Run(options)
    run.graphs()
    print(run.summary())
    run.shrink()
    return bool(run.state["findings"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
