"""What must hold of every network and every merge of it, exactly: all of it in float64, against the network itself.

A network B is A with its channels in another order (`spec.permute`). Every merge of A and B that puts the same channels
together is A again, on both heads, at every cut and start. The order is known, so these *true maps* are made directly
(`merge_by_true_maps`) and a merge is checked without any matching; one by `convert` is wrong as well where it matches
channels that are no pair, though nothing is dead and no two channels are alike.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor, nn

import fxzip
from fxzip.channels import ChannelSpec
from fxzip.errors import FrozenSpaceWarning, FxzipError
from fxzip.matching import MergeMap
from fxzip.passes.permute import random_permutations
from fxzip.passes.split import split
from tests.fuzz.program import Program, build, inputs_of, off, run, tensors
from tests.nets import snapshot

PERMUTED, MERGED, REFITTED = 1e-8, 1e-6, 0.05
"""Most that outputs may be off, as a share of the largest: of a permuted copy, of a merge, of a refit of an exact merge."""
IMAGES = 64


@dataclass
class Outcome:
    """What became of a network.

    Attributes:
        wrong: Oracles that failed, with how far off outputs were.
        raw: Errors that are none of fxzip's own, with the oracle that raised them.
        mismatched: Merges by `convert` that were off although the true maps are right.
        refused: What fxzip would not do, in its words.
        frozen: Warnings of channels that are kept in place.
        coverage: Of the channel spaces; None where there are none.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    coverage: float | None = None

    @property
    def findings(self) -> dict[str, str]:
        """All that should not be, by oracle."""
        return {**self.wrong, **self.raw, **self.mismatched}


class Check:
    """Runs the oracles on one network.

    Args:
        program: The network.
        random: Chooses cuts and starts.
        extras: Which of the oracles that take longer are run: ``refit``, ``save``, ``three``, ``budget``, ``other``.
        verify: Passed on to `convert` where that takes it; None: its default.
    """

    def __init__(
        self, program: Program, random: Random, extras: Sequence[str] = (), verify: bool | None = None
    ) -> None:
        self.program, self.random, self.extras = program, random, extras
        self.outcome = Outcome()
        known = inspect.signature(fxzip.Prepared.convert).parameters
        self.options = {"verify": verify} if verify is not None and "verify" in known else {}
        self.net = build(program)
        self.inputs = inputs_of(program, IMAGES)
        self.wanted = run(self.net, self.inputs)

    @property
    def _batch(self) -> Any:
        """The inputs as a loader gives them: one tensor, or all by name."""
        one = len(self.inputs) == 1 and isinstance(self.inputs[0], Tensor)
        return self.inputs[0] if one else dict(zip(self.program.names, self.inputs, strict=True))

    def run(self) -> Outcome:
        """All oracles, and whether the network and the state of PyTorch are as they were."""
        before, generator = snapshot(self.net), torch.get_rng_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._all()
        self.outcome.frozen = sorted({str(w.message) for w in caught if issubclass(w.category, FrozenSpaceWarning)})
        if not _same(before, snapshot(self.net)):
            self.outcome.wrong["untouched"] = "the model is not as it was"
        if not torch.equal(generator, torch.get_rng_state()):
            self.outcome.wrong["random state"] = "PyTorch's random numbers are not as they were"
        return self.outcome

    def _all(self) -> None:
        with self._tried("analyse"):
            spec = fxzip.analyse(self.net, self.inputs)
            self.outcome.coverage = spec.coverage
            with self._tried("permutation"):
                copies = [spec.permute(self.net, Generator().manual_seed(seed)) for seed in (1, 2)]
                orders = [random_permutations(spec, Generator().manual_seed(seed)) for seed in (1, 2)]
                self._expect("permutation", PERMUTED, lambda: (run(copies[0], self.inputs),))
                self._merges(copies, orders)
        if "other" in self.extras:
            self._two_networks()

    def _merges(self, copies: list[nn.Module], orders: list[dict[str, Tensor]]) -> None:
        count = 2 if "three" in self.extras else 1
        with self._tried("prepare"):
            prepared = fxzip.prepare(self.net, *copies[:count], example_inputs=self.inputs)
            maps = true_maps(prepared.spec, orders[:count])
            spans = self._spans(prepared)
            for begin, place, title in spans:
                oracle = f"true maps {title}"
                with self._tried(oracle):
                    merged = merge_by_true_maps(prepared, maps, begin, place)
                    tolerance = PERMUTED if place == 0 else MERGED
                    self._expect(oracle, tolerance, lambda merged=merged: merged(self.inputs))
            with self._tried("observe"):
                prepared.observe([self._batch], progress=False)
                self._converts(prepared)

    def _spans(self, prepared: fxzip.Prepared) -> list[tuple[int, int, str]]:
        """The places to merge: the default cut, the empty trunk, some cuts between, and some with a start."""
        found = [(0, prepared.place(0.0), "cut=0.0")]
        with self._tried("default cut"):
            found.append((0, prepared.place(None), "cut=None"))
        cuts = list(prepared.cuts)
        for cut in self.random.sample(cuts, min(3, len(cuts))):
            with self._tried(f"cut={cut!r}"):
                found.append((0, prepared.place(cut), f"cut={cut!r}"))
        for _ in range(2):
            start, cut = self.random.choice(cuts), self.random.choice([None, self.random.choice(cuts)])
            with self._tried(f"start={start!r}"):
                found.append((*prepared._span(cut, start), f"start={start!r} cut={cut!r}"))
        return found

    def _converts(self, prepared: fxzip.Prepared) -> None:
        """Merges as users make them: matched on images, at the default cut and at another."""
        exact = {"method": "permute", "refit": False, "reset_batch_norm": False}
        cuts: list[Any] = [0.0, None, self.random.choice(list(prepared.cuts))]
        for cut in cuts:
            self._convert(f"convert cut={cut!r}", prepared, MERGED, cut=cut, **exact)
        if "refit" in self.extras and "convert cut=None" not in self.outcome.findings:
            self._convert("refit", prepared, REFITTED, method="permute")
        if "budget" in self.extras:
            self._convert("budget", prepared, MERGED, cut="flops<=1.5x", **exact)
            self._convert("select", prepared, None, method="select")
        if "save" in self.extras:
            self._saved(prepared, exact)

    def _convert(self, oracle: str, prepared: fxzip.Prepared, tolerance: float | None, **options: Any) -> None:
        with self._tried(oracle):
            zipped = prepared.convert(progress=False, **options, **self.options)
            outputs = run(zipped, self.inputs)
            if not all(bool(t.isfinite().all()) for t in tensors(outputs)):
                self.outcome.wrong[oracle] = "not finite"
            elif tolerance is not None:
                right = not any(name.startswith("true maps") or name == "permutation" for name in self.outcome.wrong)
                where = self.outcome.mismatched if right and options.get("cut") != 0.0 else self.outcome.wrong
                self._expect(oracle, tolerance, lambda: outputs, where)

    def _saved(self, prepared: fxzip.Prepared, options: dict[str, Any]) -> None:
        with self._tried("save"), tempfile.TemporaryDirectory() as folder:
            zipped = prepared.convert(progress=False, **options, **self.options)
            zipped.save(Path(folder) / "zipped")
            loaded = fxzip.load(Path(folder) / "zipped")
            before, after = run(zipped, self.inputs), run(loaded, self.inputs)
            pairs = zip(tensors(before), tensors(after), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                self.outcome.wrong["save"] = f"loaded: off by {off(before, after):.1e}"

    def _two_networks(self) -> None:
        """Two networks with weights of their own: an empty trunk is both of them, a merge is finite."""
        with self._tried("ensemble"):
            other = build(self.program, seed=1)
            wanted = self.wanted, run(other, self.inputs)
            prepared = fxzip.prepare(self.net, other, example_inputs=self.inputs)
            prepared.observe([self._batch], progress=False)
            zipped = prepared.convert(cut=0.0, progress=False, **self.options)
            error = max(off(a, b) for a, b in zip(wanted, run(zipped, self.inputs), strict=True))
            if not error <= PERMUTED:
                self.outcome.wrong["ensemble"] = f"off by {error:.1e}"
            self._convert("merge of two", prepared, None)

    def _expect(
        self, oracle: str, tolerance: float, outputs: Callable[[], Sequence[Any]], where: dict[str, str] | None = None
    ) -> None:
        error = max(off(self.wanted, output) for output in outputs())
        if not error <= tolerance:
            (self.outcome.wrong if where is None else where)[oracle] = f"off by {error:.1e}"

    @contextmanager
    def _tried(self, oracle: str) -> Iterator[None]:
        try:
            yield
        except FxzipError as error:
            self.outcome.refused[oracle] = f"{type(error).__name__}: {str(error)[:300]}"
        except Exception as error:
            self.outcome.raw[oracle] = f"{type(error).__name__}: {str(error)[:300]} [{_place(error)}]"


def true_maps(spec: ChannelSpec, orders: Sequence[dict[str, Tensor]]) -> dict[str, MergeMap]:
    """The merge maps of a network and of permuted copies of it, each made with one of these orders."""
    maps = {}
    for space in spec.spaces:
        channels = [torch.arange(space.size), *(order[space.name] for order in orders)]
        maps[space.name] = MergeMap.from_assignment(torch.cat(channels), len(channels))
    return maps


def merge_by_true_maps(
    prepared: fxzip.Prepared, maps: dict[str, MergeMap], begin: int, place: int
) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """The merged network by given maps, a function of the inputs that gives each head's output."""
    here = {name: maps[name] for name in _with_parents(prepared, begin, place)}
    parts = split(prepared.alignment, prepared.spec, here, place, begin)

    def merged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        crossing = run(parts.trunk, inputs)
        return tuple(run(head, crossing) for head in parts.heads)

    return merged


def _with_parents(prepared: fxzip.Prepared, begin: int, place: int) -> set[str]:
    from fxzip.passes.match import with_parents

    return with_parents(prepared.spec, prepared._spaces_between(begin, place))


def _same(before: Any, after: Any) -> bool:
    tensors_before, rest_before = before
    tensors_after, rest_after = after
    return (
        rest_before == rest_after
        and tensors_before.keys() == tensors_after.keys()
        and all(torch.equal(tensors_before[key], tensors_after[key]) for key in tensors_before)
    )


def _place(error: BaseException) -> str:
    """The file and function of fxzip that an error came through last."""
    found, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        path = Path(code.co_filename).resolve()
        if "passes" in path.parts or "fxzip" in path.parts[-4:]:
            found = f"{'/'.join(path.parts[-2:])}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return found
