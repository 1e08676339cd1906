"""`Prepared`: traced and analysed networks, to be observed once and merged as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxzip.channels import ChannelSpec
from fxzip.data.batches import to_device, with_batch_size
from fxzip.data.loaders import as_one_loader
from fxzip.data.loops import counted
from fxzip.errors import AlignmentError, CalibrationError, CutError, OptionError
from fxzip.flops import flop_counter
from fxzip.matching import MergeMap, evidence, match, options
from fxzip.merged import ZippedModel
from fxzip.moments import Moments
from fxzip.names import bad_name
from fxzip.passes.align import Alignment
from fxzip.passes.cut import Cut, Cuts, crossing
from fxzip.passes.cut.budget import cost_of_cuts, cost_of_joins, cut_within, parse_budget
from fxzip.passes.match import match_spaces
from fxzip.passes.match_weights import match_by_weights
from fxzip.passes.observe import observe
from fxzip.passes.points import Which, merge_points
from fxzip.passes.recalibrate import recalibrate
from fxzip.passes.refit import RefitOptions
from fxzip.passes.refit import refit as refit_parts
from fxzip.passes.reuse import reuse_memory
from fxzip.passes.split import paired_parameters, split
from fxzip.passes.split.stems import joined_channels
from fxzip.report import Cost, Report, SpaceRow
from fxzip.sweep import Sweep, SweepRow, as_scores
from fxzip.views.outline import outline


class Prepared:
    """Networks that `fxzip.prepare` has traced, aligned and analysed.

    Attributes:
        names: The tasks.
        alignment: The traced networks and the nodes that they share.
        spec: The channel spaces.
        moments: What was observed, by space; empty before `observe`.
    """

    def __init__(self, names: Sequence[str], alignment: Alignment, spec: ChannelSpec, cuts: Cuts) -> None:
        self.names = tuple(names)
        self.alignment = alignment
        self.spec = spec
        self.moments: dict[str, Moments] = {}
        self._cuts = cuts
        self._loader: Iterable[Any] | None = None

    @property
    def cuts(self) -> tuple[str, ...]:
        """The valid cuts, by the module that the heads begin at, in the order of execution."""
        return self._cuts.names

    def place(self, cut: Cut, start: Cut = None) -> int:
        """The number of shared nodes in the trunk of a cut, its stems among them.

        Raises:
            CutError: The cut or the start is unknown or invalid, no cut meets the budget, or the layers between share
                no channel space.
        """
        return self._span(cut, start)[1]

    def _span(self, cut: Cut, start: Cut) -> tuple[int, int]:
        """The places of what is merged: how many of the shared nodes come before it, and before its end."""
        begin, budget = self._begin(start), parse_budget(cut)
        place = self._cuts.resolve(cut) if budget is None else cut_within(self._costs_from(begin), budget)
        layers = any(begin <= layer < place for layer in self._cuts.layers)
        if begin and not layers:
            raise CutError(f"start={start!r}: no layer is left to merge before the cut at {self._name_of(place)}")
        if cut is None and not layers:
            why = self.alignment.parting or "their classifiers come first"
            raise CutError(f"no layer comes before the place where the heads begin: {why}")
        if layers and not self._spaces_between(begin, place):
            frozen = "; ".join(f"{f.name}: {f.reason}" for f in self.spec.frozen[:3])
            raise CutError(f"cut={cut!r}: the layers before it share no channel space that can be merged; {frozen}")
        return begin, place

    def _begin(self, start: Cut) -> int:
        """The number of shared nodes that come before what is merged."""
        if start is None:
            return 0
        if parse_budget(start) is not None:
            raise CutError(f"start={start!r}: give the name of a module or node, or a share of the layers")
        begin = self._cuts.resolve(start, "start")
        joined_channels(self.alignment, self.spec, begin)  # raises where stems cannot be joined
        return begin

    @cached_property
    def _costs(self) -> dict[int, float]:
        places = [place for place in self._cuts.valid if place <= self._cuts.default]
        return cost_of_cuts(self.alignment, places, self.spec.example)

    def _costs_from(self, begin: int) -> dict[int, float]:
        """What the cuts behind a start cost: what comes before it is run for each model, and then joined."""
        if not begin:
            return self._costs
        again = len(self.names) - self._costs[begin]
        again += cost_of_joins(self.alignment, joined_channels(self.alignment, self.spec, begin), self.spec.example)
        return {place: cost + again for place, cost in self._costs.items() if place > begin}

    def _spaces_between(self, begin: int, place: int) -> set[str]:
        names = self.alignment.trunk_names(0)
        nodes = [*names[begin:place], *(names[i] for i in (crossing(self.alignment, begin) if begin else ()))]
        return {space.name for node in nodes for space, _, _ in self.spec.locate(node)}

    def observe(self, loader: Iterable[Any], *, points: Which = "last", progress: bool = True) -> Prepared:
        """Record the moments of all models' channels over a loader; replaces what was observed before.

        Args:
            loader: As for `fxzip.zip`. `convert` reads it again to reset BatchNorm statistics.
            points: One merge point for each space (``last``), or ``all`` of them pooled.
            progress: Show a bar.

        Raises:
            CalibrationError: The loader is empty, gives the wrong thing, or activations are not finite.
        """
        loader = as_one_loader(loader, self.names)
        module = self.alignment.modules[0]
        nodes = self.alignment.trunk_names(0)[: self._cuts.default]
        where = merge_points(module, self.spec, nodes, points)
        self.moments = observe(self.alignment, where, loader, progress=progress)
        self._loader = loader
        return self

    def convert(
        self,
        *,
        cut: Cut = None,
        start: Cut = None,
        method: str = "zip",
        alpha: float | None = None,
        beta: float | None = None,
        refit: bool = True,
        ridge: float = RefitOptions.ridge,
        rounds: int = RefitOptions.rounds,
        images: int = RefitOptions.images,
        reset_batch_norm: bool = True,
        progress: bool = True,
        **others: Any,
    ) -> ZippedModel:
        """Merge the networks, from what was observed.

        Args:
            cut: As for `fxzip.zip`.
            start: As for `fxzip.zip`.
            method: As for `fxzip.zip`.
            alpha: As for `fxzip.zip`.
            beta: As for `fxzip.zip`.
            refit: Solve the merged layers by least squares (`fxzip.passes.refit`); False: the paper's rule.
            ridge: As for `fxzip.zip`.
            rounds: As for `fxzip.zip`.
            images: As for `fxzip.zip`.
            reset_batch_norm: Without refit: reset the merged network's BatchNorm statistics on the loader.
            progress: Show a bar.
            others: Further options of the method, ``gamma`` of ``dual`` and of ``cca``.

        Raises:
            CalibrationError: Nothing was observed yet.
            CutError, OptionError: The cut, the method or its options are not valid.
        """
        chosen = check_method(method, {"alpha": alpha, "beta": beta, **others}, len(self.names))
        options = RefitOptions(ridge=ridge, rounds=rounds, images=images)
        begin, place = self._span(cut, start)
        if self._loader is None:
            raise CalibrationError("nothing was observed yet: call prepared.observe(loader) first")
        maps = self._match(method, chosen, self._spaces_between(begin, place))
        parts = split(self.alignment, self.spec, maps, place, begin)
        merged = any(begin <= layer < place for layer in self._cuts.layers)
        refitted = 0
        if refit and merged:
            refitted = refit_parts(
                parts, self.alignment, self.spec, maps, place, self._loader, options, progress, begin
            )
        heads = dict(zip(self.names, parts.heads, strict=True))
        where = self._shown(cut, place), self._shown(start, begin) if begin else None
        report = self._report(parts.trunk, heads, maps, where, method, chosen, refitted)
        example = with_batch_size(*to_device(*self.spec.example, "cpu"), 2)
        zipped = ZippedModel(parts.trunk, heads, report, example).eval()
        if reset_batch_norm and merged and not refit:
            stems = [f"trunk.{name}" for name in parts.stems]
            count = recalibrate(zipped, self._loader, progress=progress, skip=stems)
            zipped.report = report.with_recalibrated(count)
        for part in (parts.trunk, *parts.heads):
            reuse_memory(part)
        return zipped

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
            OptionError: There is no ``evaluate``.
            CalibrationError, CutError: As for `convert`.
        """
        if evaluate is None:
            raise OptionError("sweep needs evaluate: a function from the merged network to a number or to several")
        places = self._spread() if cuts is None else list(cuts)
        chosen = [{"method": m} if isinstance(m, str) else dict(m) for m in methods]
        names = [str(options.pop("name", options.get("method", "zip"))) for options in chosen]
        rows = []
        with counted(len(places) * len(chosen), progress, "merging") as done:
            for name, options in zip(names, chosen, strict=True):
                for cut in places:
                    zipped = self.convert(cut=cut, progress=False, **options)
                    rows.append(_sweep_row(name, zipped, as_scores(evaluate(zipped))))
                    done()
        return Sweep(tuple(rows))

    def _spread(self, count: int = 8) -> list[Cut]:
        """Cuts that merge something, at equal shares of the layers, and the last one."""
        shares = {self._cuts.resolve(k / count): k / count for k in range(1, count)}
        return [*(share for place, share in shares.items() if self._spaces_between(0, place)), None]

    def _match(self, method: str, chosen: Mapping[str, float], names: set[str]) -> dict[str, MergeMap]:
        if evidence(method) != "weights":
            return match_spaces(self.spec, self.moments, method, len(self.names), names, **chosen)
        peers = paired_parameters(self.alignment, len(self.alignment.shared))
        whole = [module.state_dict() for module in self.alignment.modules]
        states = [{name: state[own[k]] for name, own in peers.items()} for k, state in enumerate(whole)]
        gamma = chosen.get("gamma", 0.0)
        seen = {name: found.correlation.cpu() for name, found in self.moments.items()} if gamma else {}
        return match_by_weights(self.spec, states, names, seen, gamma)

    def _report(
        self, trunk: fx.GraphModule, heads: Mapping[str, fx.GraphModule], maps: Mapping[str, MergeMap],
        where: tuple[str, str | None], method: str, chosen: Mapping[str, float], refitted: int,
    ) -> Report:  # fmt: skip
        args, kwargs = with_batch_size(*self.spec.example, 1)
        trunk_cost, crossing = measure_cost(trunk, args, kwargs)
        shown = ", ".join(f"{key}={value:g}" for key, value in chosen.items())
        return Report(
            names=self.names,
            method=f"{method}({shown})" if shown else method,
            cut=where[0],
            start=where[1],
            traced_by=tuple(str(module.meta.get("traced_by")) for module in self.alignment.modules),
            parting=self.alignment.parting,
            spaces=tuple(self._row(name, maps[name]) for name in (s.name for s in self.spec.spaces) if name in maps),
            frozen=tuple(f"{space.name} ({space.size}): {space.reason}" for space in self.spec.frozen),
            coverage=self.spec.coverage,
            before=self._before,
            trunk=trunk_cost,
            heads=tuple(measure_cost(head, crossing, {})[0] for head in heads.values()),
            refitted=refitted,
            layers=outline(trunk, heads, args, kwargs, lambda node: self._merged_in(node, maps)),
        )

    def _merged_in(self, node: str, maps: Mapping[str, MergeMap]) -> tuple[str, ...]:
        """The merged spaces in a node's output."""
        return tuple(space.name for space, _, _ in self.spec.locate(node) if space.name in maps)

    @cached_property
    def _before(self) -> tuple[Cost, ...]:
        args, kwargs = with_batch_size(*self.spec.example, 1)
        return tuple(measure_cost(module, args, kwargs)[0] for module in self.alignment.modules)

    def _row(self, name: str, merge_map: MergeMap) -> SpaceRow:
        space, seen = self.spec[name], self.moments.get(name)
        correlation = None if seen is None else merge_map.mean_correlation(seen.correlation)
        return SpaceRow(name, space.size, len(space.sites), correlation, merge_map.within_share)

    def _shown(self, cut: Cut, place: int) -> str:
        """A cut as its user named it."""
        return cut if isinstance(cut, str) and parse_budget(cut) is None else self._name_of(place)

    def _name_of(self, place: int) -> str:
        return next((name for name, at in self._cuts.named.items() if at == place), "the output")


def _sweep_row(name: str, zipped: ZippedModel, scores: dict[str, float]) -> SweepRow:
    report = zipped.report
    one = len(report.before)
    flops = one * report.flops_after / max(report.flops_before, 1)
    return SweepRow(name, report.cut, flops, one * report.params_after / max(report.params_before, 1), scores)


def measure_cost(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Cost, Any]:
    """Parameters and floating-point operations of a module on one example, and what it gives."""
    with torch.no_grad(), flop_counter() as counter:
        result = module(*args, **kwargs)
    return Cost(sum(p.numel() for p in module.parameters()), int(counter.get_total_flops())), result


def check_models(models: Sequence[Any]) -> None:
    """Raise what is wrong with the models that a user gave."""
    for number, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise OptionError(f"model {number} is a {type(model).__name__}, not a torch.nn.Module")
    if len(models) < 2:
        raise OptionError(f"{len(models)} model given: merging takes two models or more")
    devices = [{p.device for p in (*model.parameters(), *model.buffers())} for model in models]
    for number, found in enumerate(devices):
        if len(found) > 1:
            raise AlignmentError(f"model {number} lies on several devices: {', '.join(sorted(map(str, found)))}")
        if found != devices[0] and found and devices[0]:
            ours, peers = found.pop(), devices[0].pop()
            raise AlignmentError(f"model {number} is on {ours}, model 0 is on {peers}; move them to one device")


def task_names(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    """The tasks' names: the given ones, or task0, task1 ..."""
    if names is None:
        return tuple(f"task{number}" for number in range(count))
    found = (names,) if isinstance(names, str) else tuple(names)
    if len(found) != count or len(set(found)) != count:
        raise OptionError(f"names={found}: give one name for each of the {count} models, all different")
    wrong = bad_name(found)
    if wrong is not None:
        raise OptionError(wrong)
    return found


def check_method(method: str, given: Mapping[str, float | None], n_models: int) -> dict[str, float]:
    """The options to pass to a matcher: its defaults, and what is given and not None.

    Raises:
        OptionError: The method is unknown or does not take so many models, or an option is out of range or not
            one of its own.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    match(method, torch.eye(n_models), n_models=n_models, **chosen)
    return {**options(method), **chosen}
