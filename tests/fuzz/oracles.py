"""What must hold of every network and every merge of it, exactly: all of it in float64, against the network itself.

A network B is A with its channels in another order (`spec.permute`). Every merge of A and B that puts the same channels
together is A again, on both heads, at every cut and start. The order is known, so these *true maps* are made directly
(`merge_by_true_maps`) and a merge is checked without any matching; one by `convert` is wrong as well where it matches
channels that are no pair, though nothing is dead and no two channels are alike.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Generator, Tensor, fx

import fxzip
from fxzip.channels import ChannelSpec
from fxzip.checks import task_names
from fxzip.errors import FrozenSpaceWarning, FxzipError
from fxzip.matching import MergeMap
from fxzip.passes.align import align
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.cut import MergePlan, Span
from fxzip.passes.permute import permute, random_permutations
from fxzip.passes.split import split
from fxzip.passes.trace import trace
from fxzip.passes.verify import Verifier
from tests.fuzz.outcome import Outcome
from tests.fuzz.program import Program, build, inputs_of, off, run, tensors
from tests.fuzz.ties import tied_spaces
from tests.nets import snapshot

PERMUTED, MERGED, REFITTED = 1e-8, 1e-6, 0.05
"""Most that outputs may be off, as a share of the largest: of a permuted copy, a merge, a refit of an exact merge."""
IMAGES = 64


class Check:
    """Runs the oracles on one network.

    Args:
        program: The network.
        random: Chooses cuts and starts.
        extras: Which of the oracles that take longer are run: ``refit``, ``save``, ``three``, ``budget``, ``modules``.
        verify: Passed on to `convert` where that takes it; None: its default.
        only: The kind of finding that is looked for; what cannot show it is left out.
    """

    def __init__(
        self,
        program: Program,
        random: Random,
        extras: Sequence[str] = (),
        verify: bool | None = None,
        only: str | None = None,
    ) -> None:
        self.program, self.random, self.extras = program, random, extras
        self.merges, self.converts = only != "permutation", only is None or not only.startswith(("perm", "true maps"))
        self.outcome = Outcome()
        self.options = {} if verify is None else {"verify": verify}
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
        caught = [text for text in self.outcome.frozen if "bug in fxzip" in text]
        if caught:
            self.outcome.caught["caught"] = "; ".join(caught)[:300]
        if not _same(before, snapshot(self.net)):
            self.outcome.touched["model"] = "the model is not as it was"
        if not torch.equal(generator, torch.get_rng_state()):
            self.outcome.touched["random state"] = "PyTorch's random numbers are not as they were"
        return self.outcome

    def _all(self) -> None:
        with self._tried("analyse"):
            with torch.random.fork_rng():  # as the public functions do
                traced = canonicalise(trace(self.net, self.inputs))
                spec = analyse_graph(traced, self.inputs, {})
                if self.options.get("verify"):
                    spec = Verifier(traced, (self.inputs, {})).checked_spec(spec)[0]
            self.outcome.coverage = spec.coverage
            count = 2 if "three" in self.extras else 1
            orders = [random_permutations(spec, Generator().manual_seed(seed)) for seed in range(1, count + 1)]
            self._permuted(spec, orders[0])
            if not self.merges:
                return
            with self._tried("prepare"):
                copies = [permute(spec, traced, order) for order in orders]
                self._merges(prepared_of([traced, *copies], spec), orders)
        if "modules" in self.extras and self.converts:
            self._two_networks()

    def _permuted(self, spec: ChannelSpec, order: dict[str, Tensor]) -> None:
        with self._tried("permutation"), torch.random.fork_rng():
            copied = spec.permute(self.net, Generator().manual_seed(1))
            self._expect("permutation", PERMUTED, lambda: (run(copied, self.inputs),))

    def _merges(self, prepared: fxzip.Prepared, orders: Sequence[dict[str, Tensor]]) -> None:
        maps = true_maps(prepared.spec, orders)
        # With the net, what is wrong at one cut only is found by `convert`.
        for begin, place, title in self._spans(prepared) if not self.options.get("verify") else ():
            oracle = f"true maps {title}"
            with self._tried(oracle):
                merged = merge_by_true_maps(prepared, maps, begin, place)
                self._expect(oracle, MERGED if place else PERMUTED, lambda merged=merged: merged(self.inputs))
        if not self.converts:
            return
        with self._tried("observe"):
            prepared.observe([self._batch], progress=False)
            spec = prepared.spec  # a merge may keep spaces in place
            self._converts(prepared)
        if self.outcome.mismatched and tied_spaces(prepared.alignment.modules[0], spec, self.inputs):
            self.outcome.mismatched = {}

    def _spans(self, prepared: fxzip.Prepared) -> list[tuple[int, int, str]]:
        """The places to merge: the default cut, the empty trunk, some cuts between, and some with a start."""
        found = [(0, prepared.place(0.0), "cut=0.0")]
        with self._tried("default cut"):
            found.append((0, prepared.place(None), "cut=None"))
        cuts = list(prepared.cuts)
        for cut in self.random.sample(cuts, min(2, len(cuts))):
            with self._tried(f"cut={cut!r}"):
                found.append((0, prepared.place(cut), f"cut={cut!r}"))
        start, cut = self.random.choice(cuts), self.random.choice([None, self.random.choice(cuts)])
        with self._tried(f"start={start!r}"):
            span = prepared.places.span(cut, start)
            found.append((span.begin, span.end, f"start={start!r} cut={cut!r}"))
        return found

    def _converts(self, prepared: fxzip.Prepared) -> None:
        """Merges as users make them: matched on images, at the default cut and at another."""
        exact = {"method": "permute", "refit": False, "reset_batch_norm": False}
        cuts: list[Any] = [None] if self.random.random() < 0.5 else [None, self.random.choice(list(prepared.cuts))]
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
            prepared = fxzip.prepare(self.net, other, example_inputs=self.inputs, **self.options)
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


def prepared_of(graphs: Sequence[fx.GraphModule], spec: ChannelSpec) -> fxzip.Prepared:
    """What `fxzip.prepare` gives for graphs of one network that are traced and analysed already: tracing is slow."""
    alignment = align(graphs)
    return fxzip.Prepared(task_names(None, len(graphs)), alignment, spec)


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
    spec = prepared.spec
    here = {name: maps[name] for name in spec.with_parents(prepared.places.spaces(Span(begin, place)))}
    parts = split(MergePlan(prepared.alignment, spec, here, begin, place))

    def merged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        crossing = run(parts.trunk, inputs)
        return tuple(run(head, crossing) for head in parts.heads)

    return merged


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
