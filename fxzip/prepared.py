"""`Prepared`: traced and analysed networks, to be observed once and merged as often as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from fxzip.channels import ChannelSpec, MergePoint
from fxzip.checks import check_flag, check_merge, check_progress, device_named
from fxzip.conversion import Conversion
from fxzip.data.bars import Shown, bar_of
from fxzip.data.batches import Given
from fxzip.errors import CalibrationError, OptionError
from fxzip.information import Information
from fxzip.joint import Heads, joint_of
from fxzip.journal import NONE
from fxzip.merged import ZippedModel
from fxzip.moments import Moments
from fxzip.observed import load_prepared, observe_networks, save_observed
from fxzip.originals import Originals
from fxzip.passes.align import Alignment
from fxzip.passes.cut import Cut, MergePlan, Places, find_cuts
from fxzip.passes.join import check_joinable
from fxzip.passes.points import Points, merge_points
from fxzip.passes.refit import RefitOptions
from fxzip.passes.resize import Resized, resize
from fxzip.passes.verify import Verifier, ensemble_error, fixed_sizes
from fxzip.processes import ALONE, Processes
from fxzip.report import Verified
from fxzip.settings import EACH
from fxzip.sizing import Sizing
from fxzip.surroundings import undisturbed
from fxzip.sweep import Sweep, faithfulness, run_sweep
from fxzip.widths import Width, parse_widths


class Prepared:
    """Networks that `fxzip.prepare` has traced, aligned and analysed.

    Attributes:
        names: The tasks.
        alignment: The traced networks and the nodes that they share.
        spec: The channel spaces.
        places: Where they can be merged, and what it costs.
        points: The merge points of each space; empty before `observe`.
        kind: Whether these are the ``last`` or ``all``.
        loader: What was observed.
        moments: What was observed there, by space; empty before `observe`.
        held: The images that were held back: of those that this process read.
        held_back: How many were held back, by all processes that share the merge.
        observed: How many others were observed, by all of them.
        verified: What was checked of the spaces; None with ``verify=False``.
        originals: The models' own classes, without weights.
        information: How images are prepared, and the names of the classes.
        processes: Those that share the merge (`fxzip.processes`).
        journal: What is kept for the case of an interruption (`fxzip.journal`).
    """

    def __init__(
        self, names: Sequence[str], alignment: Alignment, spec: ChannelSpec, verified: Verified | None = None,
        originals: Originals | None = None, information: Information | None = None, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.names = tuple(names)
        self.alignment, self.spec = alignment, spec
        self.places = Places(alignment, spec, find_cuts(alignment, spec))
        self.verified, self.originals = verified, originals
        self.information, self.processes, self.journal = information or Information(), processes, NONE
        self.points: dict[str, tuple[MergePoint, ...]] = {}
        self.moments: dict[str, Moments] = {}
        self.held: list[Given] = []
        self.observed = self.held_back = 0
        self.loader: Iterable[Any] | None = None
        self.kind: Points = "last"
        self._fixed: tuple[ChannelSpec, dict[str, str]] | None = None
        self._resized: tuple[ChannelSpec, dict[str, int], Resized | None] | None = None

    @property
    def cuts(self) -> tuple[str, ...]:
        """The valid cuts, by the module that the heads begin at, in the order of execution."""
        return self.places.cuts.names

    @property
    def costs(self) -> dict[str, float]:
        """What the merged network costs at each of the valid cuts, in multiples of the mean network's FLOPs."""
        return {name: self.places.costs[self.places.cuts.named[name]] for name in self.cuts}

    def place(self, cut: Cut, start: Cut = None, width: Width = None, budget: str | None = None) -> int:
        """The number of shared nodes in the trunk of a cut, its stems among them.

        Raises:
            CutError: The cut or the start is unknown or invalid, no cut meets the budget, or the layers between share
                no channel space.
            OptionError: The width names nothing that can change, or the budget is less than the least possible.
        """
        span, widths = self.places.span(cut, start), parse_widths(width, budget)
        if widths is not None:
            Sizing(self, widths, span).check()
        return span.end

    @undisturbed
    def observe(
        self, loader: Iterable[Any], *, points: Points = "last", hold_back: bool = True, progress: Shown = True,
        stats_device: Any = None,
    ) -> Prepared:  # fmt: skip
        """Record the moments of all models' channels over a loader; replaces what was observed before.

        Args:
            loader: As for `fxzip.zip`. `convert` reads it again to reset BatchNorm statistics.
            points: One merge point for each space (``last``), or ``all`` of them pooled.
            hold_back: Hold back some of the images (`fxzip.data.held`), so that merges can be measured on what they
                did not see. False: all are observed and fitted on, and `Report.fidelity` stays empty.
            progress: Show a bar.
            stats_device: As for `fxzip.zip`.

        Raises:
            CalibrationError: The loader is empty, gives the wrong thing, or activations are not finite.
        """
        check_progress(progress)
        check_flag("hold_back", hold_back)
        return observe_networks(self, loader, points, hold_back, progress, device_named(stats_device))

    def save(self, path: str | PathLike[str]) -> None:
        """Write what was observed, for `load`: the moments, and the images that were held back; not the models.

        Raises:
            CalibrationError: Nothing was observed yet.
            SaveError: Nothing can be written there.
        """
        self._observed()
        save_observed(self, Path(path))

    @classmethod
    @undisturbed
    def load(
        cls, path: str | PathLike[str], *models: Any, loader: Iterable[Any] | None = None, verify: bool = True,
        labels: Mapping[str, Iterable[str]] | None = None, process_group: Any = None, linearise: bool = False,
    ) -> Prepared:  # fmt: skip
        """Take up again what `save` wrote, with the same models; they are not observed once more.

            prepared = fxzip.Prepared.load("observed.safetensors", model_a, model_b, loader)

        Args:
            path: The file.
            models: The models that were observed, then the loader, which `convert` reads.
            loader: As for `fxzip.zip`.
            verify: As for `fxzip.zip`.
            labels: As for `fxzip.zip`.
            process_group: As for `fxzip.zip`.
            linearise: As it was for `fxzip.prepare`.

        Raises:
            FileFormatError: There is no such file, or it is another one.
            OptionError: The models are others than those that were observed.
        """
        return load_prepared(Path(path), models, loader, verify, labels, process_group, linearise)

    def merge_points(self, points: Points) -> dict[str, tuple[MergePoint, ...]]:
        """The merge points of each space, one or all of them."""
        nodes = self.alignment.trunk_names(0)[: self.places.cuts.default]
        return merge_points(self.alignment.modules[0], self.spec, nodes, points)

    def _observed(self) -> Iterable[Any]:
        """The loader that was observed."""
        if self.loader is None:
            raise CalibrationError("nothing was observed yet: call prepared.observe(loader) first")
        return self.loader

    @undisturbed
    def convert(
        self, *, cut: Cut = None, start: Cut = None, width: Width = None, budget: str | None = None,
        method: str = "auto", refit: bool | RefitOptions = True, effort: str = "default", heads: Heads = EACH,
        reset_batch_norm: bool = True, verify: bool = True, progress: Shown = True, **options: Any,
    ) -> ZippedModel:  # fmt: skip
        """Merge the networks, from what was observed.

        Args:
            cut: As for `fxzip.zip`.
            start: As for `fxzip.zip`.
            width: As for `fxzip.zip`.
            budget: As for `fxzip.zip`.
            method: As for `fxzip.zip`.
            refit: As for `fxzip.zip`.
            effort: As for `fxzip.zip`.
            heads: As for `fxzip.zip`.
            reset_batch_norm: Without refit: reset the merged network's BatchNorm statistics on the loader.
            verify: Check the merge before it is fitted (`fxzip.passes.verify`).
            progress: Show a bar.
            **options: Options of the method, as for `fxzip.zip`.

        Raises:
            CalibrationError: Nothing was observed yet.
            CutError, OptionError: The cut, the method or its options are not valid.
            VerificationError: The merge would be wrong.
        """
        given: dict[str, Any] = {"cut": cut, "start": start, "width": width, "budget": budget, "method": method}
        given |= {"refit": refit, "effort": effort, "heads": heads, "reset_batch_norm": reset_batch_norm}
        choice = check_merge(Prepared.convert, len(self.names), **given, verify=verify, progress=progress, **options)
        self.processes.hush()
        self.check_heads(heads)
        self.places.span(cut, start)  # raises what is wrong with them
        widths, loader = parse_widths(width, budget), self._observed()
        with bar_of(progress if self.processes.leads else False) as bar:
            return Conversion(self, choice, cut, start, loader, reset_batch_norm, bar or False, widths).run(verify)

    def plan(
        self, *, cut: Cut = None, start: Cut = None, width: Width = None, budget: str | None = None,
        method: str = "auto", **options: Any,
    ) -> MergePlan:  # fmt: skip
        """The plan that `convert` follows: where to merge, and a map for each channel space in between.

        Args:
            cut: As for `fxzip.zip`.
            start: As for `fxzip.zip`.
            width: As for `fxzip.zip`.
            budget: As for `fxzip.zip`.
            method: As for `fxzip.zip`.
            **options: Options of the method, as for `fxzip.zip`.

        Raises:
            CalibrationError, CutError, OptionError: As for `convert`.
        """
        given = {"cut": cut, "start": start, "width": width, "budget": budget, "method": method, **options}
        choice = check_merge(Prepared.convert, len(self.names), **given)
        widths, loader = parse_widths(width, budget), self._observed()
        conversion = Conversion(self, choice, cut, start, loader, True, progress=False, widths=widths)
        return conversion.plan(conversion.settled()[0])

    def check_heads(self, heads: Heads) -> None:
        """Raise unless these networks can have such heads.

        Raises:
            OptionError: One head is wanted of outputs that differ in shape, or weights are not for these tasks.
        """
        joint = joint_of(heads, self.names)
        if joint is not None:
            check_joinable(self.names, self.alignment.modules, joint)

    def keep_to(self, spec: ChannelSpec) -> None:
        """From now on merge by these channel spaces, of which verification has frozen some."""
        self.spec, self.places = spec, Places(self.alignment, spec, find_cuts(self.alignment, spec))

    @property
    def fixed(self) -> dict[str, str]:
        """The spaces that lie in no other's blocks and must keep their number of channels, each with the reason."""
        if self._fixed is None or self._fixed[0] is not self.spec:
            self._fixed = self.spec, fixed_sizes(self.verifier, self.spec)
        return self._fixed[1]

    def resized(self, blocks: Mapping[str, int]) -> Resized | None:
        """The first network with other numbers of channels; None where there are none."""
        changed = {name: count for name, count in blocks.items() if count != self.spec[name].size}
        if self._resized is None or self._resized[:2] != (self.spec, changed):
            made = resize(self.alignment.modules[0], self.spec, changed) if changed else None
            self._resized = self.spec, changed, made
        return self._resized[2]

    @cached_property
    def verifier(self) -> Verifier:
        """What checks plans on the example."""
        return Verifier(self.alignment.modules[0], self.spec.example)

    @cached_property
    def ensemble_error(self) -> float:
        """How far the heads behind an empty trunk are off, as a share of the outputs' largest value."""
        return ensemble_error(self.alignment, self.spec, self.spec.example, self.places.cuts.valid[0])

    def sweep(
        self, cuts: Iterable[Cut] | None = None, methods: Iterable[str | Mapping[str, Any]] = ("auto",),
        evaluate: Callable[[ZippedModel], float | Mapping[str, float]] | None = None, progress: bool = True,
    ) -> Sweep:  # fmt: skip
        """Merge at many cuts and in many ways, and evaluate each: accuracy over FLOPs.

            curve = prepared.sweep(["layer2", "layer3", None], ["permute", "zip"], evaluate)
            print(curve); curve.best(flops=1.3)

        Args:
            cuts: As for `fxzip.zip`; None: about eight of the valid ones, spread over the network.
            methods: Names of methods, or dicts of `convert`'s options, with a ``name`` for the table if wanted.
            evaluate: Gives a number, the greater the better, or several by name, for a merged network. None: agreement
                with the parents and the explained share of their outputs, in percent (`Report.fidelity`), for which no
                labels are needed.
            progress: Show a bar.

        Raises:
            OptionError: There is no ``evaluate`` and no image was held back, or the options of a method are not valid.
            CalibrationError, CutError: As for `convert`.
        """
        self._observed()
        if evaluate is None and not self.held_back:
            raise OptionError(
                "sweep needs evaluate, a function from the merged network to a number or to several: no image was held "
                "back that fidelity could be measured on"
            )
        where = self.places.spread() if cuts is None else list(cuts)
        return run_sweep(self, where, methods, evaluate or faithfulness, progress)
