"""`Prepared`: traced and analysed networks, to be observed once and merged as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fxzip.channels import ChannelSpec, MergePoint
from fxzip.checks import Choice, check_flag, check_merge
from fxzip.data.batches import to_device, with_batch_size
from fxzip.data.loaders import as_one_loader
from fxzip.errors import CalibrationError, OptionError
from fxzip.matching import MergeMap, evidence
from fxzip.merged import ZippedModel
from fxzip.moments import Moments
from fxzip.passes.align import Alignment
from fxzip.passes.cut import Cut, Cuts, Places, Span
from fxzip.passes.match import match_spaces
from fxzip.passes.match_weights import match_by_weights
from fxzip.passes.observe import observe
from fxzip.passes.points import Points, merge_points
from fxzip.passes.recalibrate import recalibrate
from fxzip.passes.refit import RefitOptions
from fxzip.passes.refit import refit as refit_parts
from fxzip.passes.reuse import reuse_memory
from fxzip.passes.split import paired_parameters, split
from fxzip.report_builder import build_report
from fxzip.sweep import Sweep, run_sweep


class Prepared:
    """Networks that `fxzip.prepare` has traced, aligned and analysed.

    Attributes:
        names: The tasks.
        alignment: The traced networks and the nodes that they share.
        spec: The channel spaces.
        places: Where they can be merged, and what it costs.
        points: The merge points of each space; empty before `observe`.
        moments: What was observed there, by space; empty before `observe`.
    """

    def __init__(self, names: Sequence[str], alignment: Alignment, spec: ChannelSpec, cuts: Cuts) -> None:
        self.names = tuple(names)
        self.alignment = alignment
        self.spec = spec
        self.places = Places(alignment, spec, cuts)
        self.points: dict[str, tuple[MergePoint, ...]] = {}
        self.moments: dict[str, Moments] = {}
        self._loader: Iterable[Any] | None = None

    @property
    def cuts(self) -> tuple[str, ...]:
        """The valid cuts, by the module that the heads begin at, in the order of execution."""
        return self.places.cuts.names

    @property
    def costs(self) -> dict[str, float]:
        """What the merged network costs at each of the valid cuts, in multiples of the mean network's FLOPs."""
        return {name: self.places.costs[self.places.cuts.named[name]] for name in self.cuts}

    def place(self, cut: Cut, start: Cut = None) -> int:
        """The number of shared nodes in the trunk of a cut, its stems among them.

        Raises:
            CutError: The cut or the start is unknown or invalid, no cut meets the budget, or the layers between share
                no channel space.
        """
        return self.places.span(cut, start).end

    def observe(self, loader: Iterable[Any], *, points: Points = "last", progress: bool = True) -> Prepared:
        """Record the moments of all models' channels over a loader; replaces what was observed before.

        Args:
            loader: As for `fxzip.zip`. `convert` reads it again to reset BatchNorm statistics.
            points: One merge point for each space (``last``), or ``all`` of them pooled.
            progress: Show a bar.

        Raises:
            CalibrationError: The loader is empty, gives the wrong thing, or activations are not finite.
        """
        check_flag("progress", progress)
        loader = as_one_loader(loader, self.names)
        nodes = self.alignment.trunk_names(0)[: self.places.cuts.default]
        where = merge_points(self.alignment.modules[0], self.spec, nodes, points)
        self.moments = observe(self.alignment, where, loader, progress=progress)
        self.points, self._loader = where, loader
        return self

    def _observed(self) -> Iterable[Any]:
        """The loader that was observed."""
        if self._loader is None:
            raise CalibrationError("nothing was observed yet: call prepared.observe(loader) first")
        return self._loader

    def convert(
        self, *, cut: Cut = None, start: Cut = None, method: str = "zip", refit: bool | RefitOptions = True,
        reset_batch_norm: bool = True, progress: bool = True, **options: Any,
    ) -> ZippedModel:  # fmt: skip
        """Merge the networks, from what was observed.

        Args:
            cut: As for `fxzip.zip`.
            start: As for `fxzip.zip`.
            method: As for `fxzip.zip`.
            refit: As for `fxzip.zip`.
            reset_batch_norm: Without refit: reset the merged network's BatchNorm statistics on the loader.
            progress: Show a bar.
            **options: Of the method, as for `fxzip.zip`.

        Raises:
            CalibrationError: Nothing was observed yet.
            CutError, OptionError: The cut, the method or its options are not valid.
        """
        choice = check_merge(
            Prepared.convert, len(self.names), cut=cut, start=start, method=method, refit=refit,
            reset_batch_norm=reset_batch_norm, progress=progress, **options,
        )  # fmt: skip
        span = self.places.span(cut, start)
        loader = self._observed()
        maps = self._maps(choice, span)
        parts = split(self.alignment, self.spec, maps, span.end, span.begin)
        merged, refitted = self.places.has_layers(span), 0
        if choice.refit and merged:
            refitted = refit_parts(
                parts, self.alignment, self.spec, maps, span.end, loader, choice.refit, progress, span.begin
            )
        shown = self.places.shown(cut, span.end), self.places.shown(start, span.begin) if span.begin else None
        report = build_report(self, parts, maps, choice, *shown, refitted)
        example = with_batch_size(*to_device(*self.spec.example, "cpu"), 2)
        zipped = ZippedModel(parts.trunk, dict(zip(self.names, parts.heads, strict=True)), report, example).eval()
        if reset_batch_norm and merged and not choice.refit:
            stems = [f"trunk.{name}" for name in parts.stems]
            count = recalibrate(zipped, loader, progress=progress, skip=stems)
            zipped.report = report.with_recalibrated(count)
        for part in (parts.trunk, *parts.heads):
            reuse_memory(part)
        return zipped

    def maps(self, *, cut: Cut = None, start: Cut = None, method: str = "zip", **options: Any) -> dict[str, MergeMap]:
        """The merge maps that `convert` merges by, by channel space.

        Args:
            cut: As for `fxzip.zip`.
            start: As for `fxzip.zip`.
            method: As for `fxzip.zip`.
            **options: Of the method, as for `fxzip.zip`.

        Raises:
            CalibrationError, CutError, OptionError: As for `convert`.
        """
        self._observed()
        choice = check_merge(Prepared.convert, len(self.names), cut=cut, start=start, method=method, **options)
        return self._maps(choice, self.places.span(cut, start))

    def _maps(self, choice: Choice, span: Span) -> dict[str, MergeMap]:
        method, names = choice.method, self.places.spaces(span)
        if evidence(method) != "weights":
            return match_spaces(self.spec, self.moments, method, len(self.names), names, **choice.options)
        peers = paired_parameters(self.alignment, len(self.alignment.shared))
        whole = [module.state_dict() for module in self.alignment.modules]
        states = [{name: state[own[k]] for name, own in peers.items()} for k, state in enumerate(whole)]
        gamma = choice.options.get("gamma", 0.0)
        seen = {name: found.correlation.cpu() for name, found in self.moments.items()} if gamma else {}
        return match_by_weights(self.spec, states, names, seen, gamma)

    def sweep(
        self,
        cuts: Iterable[Cut] | None = None,
        methods: Iterable[str | Mapping[str, Any]] = ("zip",),
        evaluate: Callable[[ZippedModel], float | Mapping[str, float]] | None = None,
        progress: bool = True,
    ) -> Sweep:
        """Merge at many cuts and in many ways, and evaluate each: accuracy over FLOPs.

            curve = prepared.sweep(["layer2", "layer3", None], ["permute", "zip"], evaluate)
            print(curve); curve.best(flops=1.3)

        Args:
            cuts: As for `fxzip.zip`; None: about eight of the valid ones, spread over the network.
            methods: Names of methods, or dicts of `convert`'s options, with a ``name`` for the table if wanted.
            evaluate: Gives a number, the greater the better, or several by name, for a merged network.
            progress: Show a bar.

        Raises:
            OptionError: There is no ``evaluate``, or the options of a method are not valid.
            CalibrationError, CutError: As for `convert`.
        """
        if evaluate is None:
            raise OptionError("sweep needs evaluate: a function from the merged network to a number or to several")
        where = self.places.spread() if cuts is None else list(cuts)
        return run_sweep(self, where, methods, evaluate, progress)
