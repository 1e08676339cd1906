"""`Stitching`: two networks that share nothing as one, of which one goes on from the other's features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from fxzip.channels import ChannelSpec
from fxzip.data.bars import Bar, Shown
from fxzip.data.batches import Given, Inputs, to_device, with_batch_size
from fxzip.data.calibration import Images, read_images
from fxzip.data.held import HeldBack, without
from fxzip.data.loops import batches, counted, device_of
from fxzip.errors import AlignmentError, CutError, FewImagesWarning, LowFidelityWarning, OptionError, VerificationError
from fxzip.fidelity import Fidelity
from fxzip.graphs import bind_inputs, placeholders
from fxzip.information import Information
from fxzip.learning import learn_as, learns
from fxzip.merged import ZippedModel
from fxzip.passes.align import Alignment, align
from fxzip.passes.choose import Short
from fxzip.passes.compare import compare
from fxzip.passes.cut import MergePlan
from fxzip.passes.cut.budget import Counts, count
from fxzip.passes.refit import RefitOptions, refit_rest
from fxzip.passes.refit.kept import norms_as_modules
from fxzip.passes.reuse import reuse_memory
from fxzip.passes.split import Split, split
from fxzip.passes.stitch import Seam, Spot, Spots, Wanted, find_spots, head_of, seams, weave
from fxzip.passes.verify.precision import own_precision
from fxzip.passes.verify.reference import error_of, run
from fxzip.report import STITCH, Report, Verified
from fxzip.report_builder import measure_cost
from fxzip.views.outline import outline

OF_SEAMS = Short(8, 64, 250, 2**14, steps=0, whole_heads=True)
"""By which places are compared with one another. What comes behind the map is solved, too: the map alone says little of
a network that goes on early, in which small errors grow."""
_NOT_TAKEN = ("start", "width", "budget", "resume", "memory", "stats_device")
"""Arguments of `fxzip.zip` that mean nothing where nothing is matched."""


def check_stitch(models: Sequence[object], given: Mapping[str, Any]) -> None:
    """Raise what is wrong with the arguments of a stitch in any networks.

    Raises:
        OptionError: There are not two networks, or an argument is given that a stitch has no use for.
        CutError: The cut cannot be read.
    """
    if not isinstance(given["stitch"], bool):
        raise OptionError(f"stitch={given['stitch']!r}: give True or False")
    if not given["stitch"]:
        return
    if len(models) != 2:
        raise OptionError(f"stitch=True takes two models, and {len(models)} are given")
    used = [name for name in _NOT_TAKEN if given.get(name) is not None]
    used += ["method"] if given["method"] != "auto" else []
    used += ["heads"] if given["heads"] != "each" else []
    if used:
        raise OptionError(f"stitch=True matches no channels, so it takes no {used[0]}={given[used[0]]!r}")
    if given["refit"] is False:
        raise OptionError("stitch=True with refit=False: the map between the networks is solved by refit")
    Wanted.of(given["cut"])


@dataclass(eq=False)
class Stitching:
    """Two networks that are to be stitched.

    Attributes:
        names: The tasks.
        graphs: The traced networks.
        specs: Their channel spaces.
        checked: What was checked of the spaces.
        loader: Images.
        options: How the layers are solved that get other inputs than they had.
        hold_back: Hold back some of the images.
        progress: Show bars.
    """

    names: tuple[str, ...]
    graphs: tuple[fx.GraphModule, ...]
    specs: tuple[ChannelSpec, ...]
    checked: tuple[Verified | None, ...]
    loader: Iterable[Any]
    options: RefitOptions
    hold_back: bool = True
    progress: Shown = True

    def run(self, cut: Any, information: Information) -> ZippedModel:
        """Find the places, fit, and measure.

        Args:
            cut: As for `fxzip.zip`.
            information: What is known of the networks.

        Raises:
            CutError: There are no such places.
            AlignmentError: The networks cannot be stitched anywhere, or take different inputs.
            VerificationError: What is left of a network behind its place is not what it was.
        """
        found = [placeholders(graph) for graph in self.graphs]
        if len(found[0]) != len(found[1]):
            raise AlignmentError(f"the networks take {len(found[0])} and {len(found[1])} inputs: they cannot share one")
        wanted = Wanted.of(cut)
        tried = self._tried(seams(wanted, self.spots, self.counts))
        seam = _chosen(wanted, tried, self.names)
        verified = self._verified(seam)
        self._phase("fitting")
        parts, refitted, fidelity = self._fitted(seam)
        if fidelity is not None and fidelity.advice:
            warnings.warn(fidelity.advice, LowFidelityWarning, stacklevel=4)
        report = self._report(seam, parts, refitted, fidelity, verified)
        report = replace(report, tried=tuple(_shown(each, kept, self.names) for each, kept in tried if kept))
        return self._handed_out(parts, report, information)

    def _phase(self, description: str) -> None:
        if isinstance(self.progress, Bar):
            self.progress.phase(description)

    @property
    def example(self) -> Inputs:
        """What the networks were traced with."""
        return self.specs[0].example

    @cached_property
    def counts(self) -> tuple[Counts, ...]:
        """What the nodes of each network do for one example."""
        return tuple(count(graph, self.example) for graph in self.graphs)

    @cached_property
    def spots(self) -> tuple[Spots, ...]:
        """Where each network can be left, and can go on."""
        pairs = zip(self.graphs, self.specs, strict=True)
        return tuple(find_spots(model, align([graph]), spec) for model, (graph, spec) in enumerate(pairs))

    @cached_property
    def held(self) -> list[Given]:
        """The images that are held back."""
        if not self.hold_back:
            return []
        picking = HeldBack(self.loader)
        with batches(self.loader, device=device_of(self.graphs[0]), progress=False) as given:
            for args, kwargs in given:
                picking.rest(args, kwargs)
        return picking.held

    @cached_property
    def _images(self) -> Images:
        return read_images(without(self.loader, self.held), device_of(self.graphs[0]), self.options)

    def _tried(self, found: Sequence[Seam]) -> list[tuple[Seam, Fidelity | None]]:
        """What short fits keep, at each of some seams; nothing is fitted where there is only one."""
        if len(found) == 1 or not self.held:
            return [(seam, None) for seam in found]
        options = OF_SEAMS.options(self.options)
        assert options is not None
        few = self._images.thinned(OF_SEAMS.images(self._images.count))
        tried: list[tuple[Seam, Fidelity | None]] = []
        with counted(len(found), self.progress, "choosing where to stitch") as done, warnings.catch_warnings():
            warnings.simplefilter("ignore", FewImagesWarning)
            for seam in found:
                woven = weave(self.graphs, seam.trunk, seam.rest)
                refit_rest(woven, self.graphs[seam.rest.model], self._before(seam.rest), few, options)
                tried.append((seam, self._measured(self._parts(seam, woven), few.count)))
                done()
        return tried

    def _before(self, spot: Spot) -> list[fx.Node]:
        """The nodes that a network does not run where it goes on, the one aside that is found from another."""
        nodes = list(self.graphs[spot.model].graph.nodes)[: spot.end]
        return [node for node in nodes if node is not spot.node]

    def _fitted(self, seam: Seam) -> tuple[Split, int, Fidelity | None]:
        """The map and what comes behind it, solved in full, or the map alone where that keeps clearly more.

        Returns:
            Trunk and heads, how many layers were solved, and what is kept.
        """
        found: list[tuple[Split, int, Fidelity | None]] = []
        for whole in (True, False):
            woven, parent = weave(self.graphs, seam.trunk, seam.rest), self.graphs[seam.rest.model]
            given = self._before(seam.rest), self._images, self.options
            solved = refit_rest(woven, parent, *given, self.progress, whole=whole)
            parts = self._parts(seam, woven)
            found.append((parts, solved, self._measured(parts, self._images.count)))
        (*_, kept), (*_, other) = found
        return found[kept is not None and other is not None and other.clearly_better_than(kept)]

    def _parts(self, seam: Seam, woven: fx.GraphModule) -> Split:
        """The trunk, and the heads in the order of the tasks."""
        first = split(self._alone(seam.trunk))
        heads = {seam.trunk.model: first.heads[0], seam.rest.model: head_of(woven, seam.trunk)}
        return Split(first.trunk, (heads[0], heads[1]))

    def _alone(self, spot: Spot) -> MergePlan:
        """One network, cut at a spot."""
        return MergePlan(align([self.graphs[spot.model]]), self.specs[spot.model], {}, 0, spot.end)

    def _measured(self, parts: Split, fitted: int) -> Fidelity | None:
        plan = MergePlan(Alignment(self.graphs, ()), self.specs[0], {}, 0, 0)
        return compare(parts, plan, self.names, {}, self.held, fitted)

    def _verified(self, seam: Seam) -> Verified | None:
        """Each network, cut at its spot and put together again, beside itself; None where nothing is to be checked.

        Raises:
            VerificationError: It is another one.
        """
        checked = [each for each in self.checked if each is not None]
        if not checked:
            return None
        errors = []
        for spot in (seam.trunk, seam.rest):
            graph, parts = self.graphs[spot.model], split(self._alone(spot))
            inputs = tuple(bind_inputs(graph, *with_batch_size(*self.example, 2)).values())
            errors.append(error_of(run(graph, inputs), run(parts.heads[0], run(parts.trunk, inputs))))
            if not errors[-1] <= own_precision(graph).tolerance:
                raise VerificationError(
                    f"{self.names[spot.model]} cut at {spot.name} is off by {errors[-1]:.1e} of its largest output: "
                    "choose another place, and report this"
                )
        return replace(max(checked, key=lambda each: each.permutation), ensemble=max(errors))

    def _report(
        self, seam: Seam, parts: Split, refitted: int, fidelity: Fidelity | None, verified: Verified | None
    ) -> Report:
        args, kwargs = with_batch_size(*self.example, 1)
        heads = dict(zip(self.names, parts.heads, strict=True))
        trunk, crossing = measure_cost(parts.trunk, args, kwargs)
        return Report(
            names=self.names,
            method=STITCH,
            cut=seam.shown(self.names),
            traced_by=tuple(str(graph.meta.get("traced_by")) for graph in self.graphs),
            parting=None,
            spaces=(),
            frozen=(),
            coverage=self.specs[seam.trunk.model].coverage,
            before=tuple(measure_cost(graph, args, kwargs)[0] for graph in self.graphs),
            trunk=trunk,
            heads=tuple(measure_cost(head, crossing, {})[0] for head in parts.heads),
            refitted=refitted,
            verified=verified,
            fidelity=fidelity,
            layers=outline(parts.trunk, heads, args, kwargs, lambda _: ()),
        )

    def _handed_out(self, parts: Split, report: Report, information: Information) -> ZippedModel:
        """The network with its report."""
        own = [learns([graph]) for graph in self.graphs]
        for part, known in zip((*parts.heads, parts.trunk), (*own, {**own[0], **own[1]}), strict=True):
            norms_as_modules(part)
            learn_as(part, known)
            reuse_memory(part)
        example = with_batch_size(*to_device(*self.example, "cpu"), 2)
        zipped = ZippedModel(parts.trunk, dict(zip(self.names, parts.heads, strict=True)), report, example).eval()
        zipped.information = information
        return zipped


def _chosen(wanted: Wanted, tried: Sequence[tuple[Seam, Fidelity | None]], names: Sequence[str]) -> Seam:
    """The seam that leaves least unexplained; with a bound on fidelity the cheapest that keeps it.

    Raises:
        CutError: None keeps it, or nothing could be measured.
    """
    known = [(seam, kept) for seam, kept in tried if kept is not None and kept.answers]
    if wanted.fidelity is None:
        return min(known, key=lambda each: each[1].unexplained)[0] if known else tried[-1][0]
    good = [seam for seam, kept in known if kept.score >= wanted.fidelity]
    if not good:
        best = max(known, key=lambda each: each[1].score, default=None)
        which = f"the best, {_shown(*best, names)}" if best else "no image was held back that it could be measured on"
        raise CutError(f"cut='fidelity>={wanted.fidelity:g}': no stitched network that was tried keeps it; {which}")
    return min(good, key=lambda seam: seam.cost)


def _shown(seam: Seam, kept: Fidelity | None, names: Sequence[str]) -> str:
    """What a seam keeps, in words."""
    text = f"{seam.shown(names)} at {seam.cost:.2f} networks' FLOPs"
    if kept is None:
        return text
    agreement = "" if kept.agreement is None else f"{kept.agreement:.1%} agreement, "
    return f"{text}: {agreement}{kept.unexplained:.1%} unexplained"
