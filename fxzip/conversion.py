"""`Conversion`: one merge of prepared networks, from the plan to the network that it gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fxzip.channels import ChannelSpec
from fxzip.checks import Choice, check_linear, check_method
from fxzip.data.bars import Bar, Shown
from fxzip.data.batches import to_device, with_batch_size
from fxzip.data.calibration import Images, read_images
from fxzip.data.held import without
from fxzip.data.loops import counted, device_of
from fxzip.errors import CutError, FewImagesWarning, LowFidelityWarning, OptionError
from fxzip.fidelity import Fidelity
from fxzip.fitted import Fitted, Whole, polished
from fxzip.joint import CONCAT, NAME, joint_of
from fxzip.learning import learn_as_parents
from fxzip.matching import is_sized
from fxzip.merged import ZippedModel
from fxzip.passes.choose import OF_BOUNDS, OF_METHODS, Short, Tried, candidates, choose, latest
from fxzip.passes.compare import compare, compare_joint
from fxzip.passes.cut import Cut, MergePlan, Span, parse_fidelity
from fxzip.passes.join import join
from fxzip.passes.maps import find_maps
from fxzip.passes.recalibrate import recalibrate
from fxzip.passes.refit import RefitOptions
from fxzip.passes.refit import refit as refit_parts
from fxzip.passes.refit.kept import norms_as_modules
from fxzip.passes.reuse import reuse_memory
from fxzip.passes.split import split
from fxzip.report import Verified
from fxzip.report_builder import build_report
from fxzip.settings import AUTO
from fxzip.sizing import SIZED, Sizing
from fxzip.widths import Widths

if TYPE_CHECKING:
    from fxzip.prepared import Prepared


@dataclass(eq=False)
class Conversion:
    """One merge: what is merged, where, and how.

    Attributes:
        prepared: The networks. Spaces that verification finds wrong are kept in place from then on.
        choice: How, as the user chose it.
        cut: Where the heads begin; a bound on fidelity is replaced by the latest cut that keeps it.
        start: Where merging starts.
        loader: What was observed.
        reset_batch_norm: Whether the paper's rule ends with a reset of BatchNorm statistics.
        progress: Show bars.
        widths: How wide the trunk is to be; None: as wide as a model.
    """

    prepared: Prepared
    choice: Choice
    cut: Cut
    start: Cut
    loader: Iterable[Any]
    reset_batch_norm: bool
    progress: Shown
    widths: Widths | None = None

    def run(self, verify: bool) -> ZippedModel:
        """Merge, fit, and measure.

        Raises:
            OptionError: Polishing is asked for in several processes.
            VerificationError: The merge would be wrong.
        """
        if self.choice.refit is not None and self.choice.refit.polish and self.prepared.processes.count > 1:
            raise OptionError("polish moves all layers together in one process: start one, or leave polish out")
        choice, tried = self.settled()
        self._phase("checking the merge" if verify else "matching")
        plan, verified = self._checked_plan(choice) if verify else (self.plan(choice), None)
        fitted = self._fitted(plan, choice.refit)
        if fitted.refitted and fitted.fidelity is not None:
            paper = self._measured("the paper's rule", choice, None, OF_BOUNDS, plan)
            if paper is not None and paper.clearly_better_than(fitted.fidelity):
                choice, fitted = replace(choice, refit=None), self._fitted(plan, None)
        if fitted.fidelity is not None and fitted.fidelity.advice:
            warnings.warn(fitted.fidelity.advice, LowFidelityWarning, stacklevel=4)
        return self._handed_out(plan, choice, fitted, verified, tried)

    def _phase(self, description: str, short: Short | None = None) -> None:
        """Say what goes on; short fits say nothing."""
        if isinstance(self.progress, Bar) and short is None:
            self.progress.phase(description)

    def settled(self) -> tuple[Choice, tuple[Tried, ...]]:
        """The choice with a method in the place of ``auto`` and what was tried to find it; the cut is found, too."""
        if self.sizing is not None:
            self.sizing.find(lambda blocks: self.plan(self._by(SIZED), blocks))
        choice, tried = self._chosen()
        self._keep_fidelity(choice)
        if self.widths is not None and self.sizing is not None and self.widths.bound == "fidelity":
            self.sizing.keep_fidelity(partial(self._tried, choice))
        return choice, tried

    @cached_property
    def sizing(self) -> Sizing | None:
        """The numbers of channels of the trunk; None where they are a model's."""
        span = self.prepared.places.span(self.cut, self.start)
        return None if self.widths is None else Sizing(self.prepared, self.widths, span)

    def _tried(self, choice: Choice) -> Fidelity | None:
        """What a merge of the present plan keeps, by a short fit."""
        return self._measured("a bound", choice, OF_BOUNDS.options(choice.refit), OF_BOUNDS)

    def _measured(
        self, what: str, choice: Choice, refit: RefitOptions | None, short: Short, plan: MergePlan | None = None
    ) -> Fidelity | None:
        """What a short fit keeps; its plan is made where it is not given."""
        blocks = {} if self.sizing is None else self.sizing.blocks
        which = f"{what} {choice.method} {self.cut} {sorted(blocks.items())} {refit is None}"
        return self.prepared.journal.fidelity(
            which, lambda: self._fitted(plan or self.plan(choice), refit, short).fidelity
        )

    def _chosen(self) -> tuple[Choice, tuple[Tried, ...]]:
        """The choice with a method in the place of ``auto``, and what was tried to find it."""
        if self.choice.method != AUTO:
            return self.choice, ()
        methods = candidates(self.prepared.alignment, self.prepared.spec)
        if self.sizing is not None:
            methods = tuple(filter(is_sized, methods))
        span = self.prepared.places.span(self.cut, self.start)
        if not self.prepared.places.has_layers(span):
            return self._by(methods[0]), ()
        with counted(len(methods), self.progress, "choosing a method") as done:

            def measure(method: str) -> Fidelity | None:
                choice = self._by(method)
                done()
                return self._measured("a method", choice, OF_METHODS.options(choice.refit), OF_METHODS)

            method, tried = choose(methods, measure)
        return self._by(method), tried

    def _keep_fidelity(self, choice: Choice) -> None:
        """Cut at the latest place whose merge is as faithful as is wanted, by short fits."""
        least = parse_fidelity(self.cut)
        if least is None:
            return
        if not self.prepared.held_back:
            raise CutError(f"cut={self.cut!r}: no image was held back, so fidelity cannot be measured")

        def score(cut: str) -> float:
            self.cut = cut
            found = self._tried(choice)
            return found.score if found is not None else 0.0

        first = self.prepared.places.span(None, self.start).begin
        cuts = [cut for cut in self.prepared.cuts if self.prepared.places.cuts.named[cut] > first]
        merging = [cut for cut in cuts if self.prepared.places.has_layers(self.prepared.places.span(cut, self.start))]
        self.cut = latest(merging, score, least)

    def plan(self, choice: Choice, blocks: Mapping[str, int] | None = None) -> MergePlan:
        """The plan of a choice whose method is known; ``blocks``: with these numbers of channels."""
        check_linear(choice.method, self.prepared.spec)
        span = self.prepared.places.span(self.cut, self.start)
        if blocks is None and self.sizing is not None:
            blocks = {root.name: self.sizing.blocks.get(root.name, root.size) for root in self.prepared.spec.spaces}
        names, observed = self.prepared.places.spaces(span), self.prepared.observed
        maps = self.prepared.processes.agreed("matching", lambda: find_maps(
            self.prepared.spec, self.prepared.alignment, self.prepared.moments, names, choice.method, choice.options,
            observed, blocks))  # fmt: skip
        resized = self.prepared.resized(blocks) if blocks else None
        return MergePlan(self.prepared.alignment, self.prepared.spec, maps, span.begin, span.end, resized)

    def _by(self, method: str) -> Choice:
        return replace(self.choice, method=method, options=check_method(method, {}, len(self.prepared.names)))

    def _checked_plan(self, choice: Choice) -> tuple[MergePlan, Verified]:
        """A plan that merges the first network with itself exactly; spaces that are to blame are kept in place."""
        prepared, before = self.prepared, self.prepared.spec

        def make(spec: ChannelSpec) -> MergePlan:
            if spec is not prepared.spec:
                prepared.keep_to(spec)
            return self.plan(choice)

        plan, error = prepared.verifier.checked_plan(before, make)
        known = prepared.verified or prepared.verifier.checked_spec(prepared.spec)[1]
        gone = tuple(space.name for space in before.spaces if space not in prepared.spec.spaces)
        return plan, replace(known, merge=error, ensemble=prepared.ensemble_error, frozen=(*known.frozen, *gone))

    @cached_property
    def _images(self) -> Images:
        """The images that are fitted on."""
        prepared = self.prepared
        rest = without(self.loader, prepared.held, prepared.processes)
        options, device = self.choice.refit or RefitOptions(), device_of(prepared.alignment.modules[0])
        return read_images(rest, device, options, prepared.processes)

    def _few(self, short: Short) -> Images:
        """The images of a short fit."""
        return self._images.thinned(short.images(self._images.count))

    def _fitted(self, plan: MergePlan, refit: RefitOptions | None, short: Short | None = None) -> Fitted:
        """Merge by a plan, fit or reset, and measure; a short fit shows no bars."""
        parts, refitted, recalibrated, seen, prepared = split(plan), 0, 0, 0, self.prepared
        progress = self.progress if short is None else False
        if not prepared.places.has_layers(Span(plan.begin, plan.end)):
            pass
        elif refit is not None and short is not None:
            few = self._few(short)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FewImagesWarning)  # the fit in full warns of them
                refitted = refit_parts(parts, plan, few, refit, progress, short.whole_heads)
            seen = few.count
        elif refit is not None:
            kept: Any = {"journal": prepared.journal, "names": prepared.names}
            refitted = refit_parts(parts, plan, self._images, refit, progress, **kept)
            if refit.polish:
                polished(prepared, parts, plan, self._images, refit, progress)
            seen = self._images.count
        elif self.reset_batch_norm:
            shared: Any = {"skip": [f"trunk.{name}" for name in parts.stems], "processes": prepared.processes}
            source = self.loader if short is None else self._few(short).own
            recalibrated = recalibrate(Whole(parts), source, progress=progress, **shared)
        points = prepared.points if short is None else {}  # a trial tells by its answers
        self._phase("comparing", short)
        fidelity = compare(parts, plan, prepared.names, points, prepared.held, seen, prepared.processes)
        return Fitted(parts, refitted, recalibrated, fidelity)

    def _handed_out(
        self, plan: MergePlan, choice: Choice, fitted: Fitted, verified: Verified | None, tried: tuple[Tried, ...]
    ) -> ZippedModel:
        """The network with its report."""
        prepared, places, parts = self.prepared, self.prepared.places, fitted.parts
        cut = places.shown(self.cut, plan.end)
        start = places.shown(self.start, plan.begin) if plan.begin else None
        for part in (parts.trunk, *parts.heads):
            norms_as_modules(part)
        learn_as_parents(plan, parts)
        names, fitted = self._joined(fitted)
        parts = fitted.parts
        report = build_report(prepared, plan.maps, choice, cut, start, fitted, verified, tried, names)
        if self.widths is not None:
            report = replace(report, width=str(self.widths))
        example = with_batch_size(*to_device(*prepared.spec.example, "cpu"), 2)
        zipped = ZippedModel(parts.trunk, dict(zip(names, parts.heads, strict=True)), report, example).eval()
        zipped.originals, zipped.information = prepared.originals, prepared.information
        if names != prepared.names:
            zipped.information = prepared.information.joined(NAME, prepared.names if choice.heads == CONCAT else None)
        for part in (parts.trunk, *parts.heads):
            reuse_memory(part)
        return zipped

    def _joined(self, fitted: Fitted) -> tuple[tuple[str, ...], Fitted]:
        """The heads' names, and with one answer from all the heads as one."""
        prepared, parts = self.prepared, fitted.parts
        joint = joint_of(self.choice.heads, prepared.names)
        if joint is None:
            return prepared.names, fitted
        parts = replace(parts, heads=(join(parts.heads, joint),))
        fidelity = fitted.fidelity
        if fidelity is not None:
            modules = prepared.alignment.modules
            fidelity = compare_joint(parts, modules, joint, prepared.held, fidelity, prepared.processes)
        return (NAME,), replace(fitted, parts=parts, fidelity=fidelity)
