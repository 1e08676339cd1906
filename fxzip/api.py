"""What users call: `zip` in one go, or `prepare`, `observe` and `convert` step by step, and `analyse`."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, overload

import torch
from torch import nn

from fxzip.channels import ChannelSpec
from fxzip.checks import (
    check_flag,
    check_linear,
    check_merge,
    check_models,
    models_and_loader,
    needs_linear,
    refit_options,
    task_names,
)
from fxzip.data.bars import bar_of
from fxzip.data.batches import to_device
from fxzip.data.checks import check_order, first_batch, ready_example, ready_loader
from fxzip.data.loops import device_of
from fxzip.data.pixels import check_pixels
from fxzip.errors import OptionError
from fxzip.fingerprint import run_of
from fxzip.information import gathered
from fxzip.joining import separated
from fxzip.joint import Heads
from fxzip.journal import Journal
from fxzip.memory import bounded, parse_memory
from fxzip.merged import ZippedModel
from fxzip.parts import ZippedParts, zip_part
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.cut import Cut
from fxzip.passes.linearity import linearity
from fxzip.passes.points import Points
from fxzip.passes.refit import RefitOptions
from fxzip.passes.trace import trace
from fxzip.prepared import Prepared
from fxzip.preparing import analysed, prepared_of, traced
from fxzip.processes import processes_of
from fxzip.settings import EACH
from fxzip.stitching import Stitching, check_stitch
from fxzip.surroundings import undisturbed
from fxzip.widths import Width

Loader = Iterable[Any]


@overload
def zip(*models: Any, part: str, **options: Any) -> ZippedParts: ...
@overload
def zip(*models: Any, part: None = None, **options: Any) -> ZippedModel: ...
@undisturbed
def zip(
    *models: Any, loader: Loader | None = None, cut: Cut = None, start: Cut = None, width: Width = None,
    budget: str | None = None, method: str = "auto",
    names: Iterable[str] | None = None, points: Points = "last", refit: bool | RefitOptions = True,
    effort: str = "default", heads: Heads = EACH, hold_back: bool = True, verify: bool = True, progress: bool = True,
    labels: Mapping[str, Iterable[str]] | None = None, process_group: Any = None,
    resume: str | PathLike[str] | None = None, memory: int | str | None = None,
    stats_device: torch.device | str | None = None, part: str | None = None, stitch: bool = False, **options: Any,
) -> ZippedModel | ZippedParts:  # fmt: skip
    """Merge trained networks of one architecture into one with a shared trunk and a head for each.

        zipped = fxzip.zip(model_a, model_b, loader)
        logits_a, logits_b = zipped(images)

    Args:
        models: Two networks or more, then the loader. They are left as they are.
        loader: Images like those that the networks were trained on, of all tasks, no labels needed: it gives tensors,
            tuples or lists whose first element is the input, or dicts of keyword inputs. It is read more than once.
            Or a loader for each network: a list of them, or a dict by the tasks' names.
        cut: The module or node that the heads begin at, a share (0 to 1) of the layers for the trunk, a budget
            (``"flops<=1.3x"`` of one network: the earliest cut that meets it; ``"fidelity>=0.98"``: the latest that
            keeps it), or None for everything up to where
            the models diverge or their classifiers begin.
        start: The module or node that merging starts at, or a share (0 to 1) of the layers: what comes before is run
            as each network has it, side by side. None: at the input.
        width: How many channels the trunk has, as a share of one network's: a number for all spaces that can change, or
            a dict by the names of modules or channel spaces (``{"layer1": 1.3}``). None: as many as one network.
        budget: What the merged network may cost, in multiples of one network (``"flops<=1.2x"``, ``"params<=1.5x"``),
            or is to keep (``"fidelity>=0.98"``, as cheaply as can be): the widths are found by what each space leaves
            unexplained for what it costs (`fxzip.passes.allocate`).
        method: ``auto`` tries some and takes the best by fidelity (`fxzip.passes.choose`); or ``select``, ``zip``,
            ``permute``, ``average``, ``optimal``, ``weights``, ``dual``, ``cca`` or ``pca`` (see `fxzip.matching`);
            for ``pca`` the networks are written as of ``linearise`` of `prepare`.
        names: Names of the tasks; default: ``task0``, ``task1`` ...
        points: One merge point for each space (``last``), or ``all`` of them pooled.
        refit: Solve each merged layer in closed form, so that it gives what the parents give on the loader's images
            (`fxzip.passes.refit`). True: with default settings; `fxzip.RefitOptions`: with these settings; False: the
            weights are merged by ZipIt!'s rule alone, and BatchNorm statistics are reset.
        effort: How much time refit takes, if no settings are given: ``fast``, ``default`` or ``thorough``
            (`fxzip.settings.EFFORTS`).
        heads: ``each``: a head for each task. For networks of the same classes ``mean``: one head, ``joint``, with
            the mean of all outputs, as their ensemble gives; or ``product``: the mean of their log-probabilities; or a
            dict of how much each task weighs in the mean, by name. For any classes ``concat``: one head with all of
            them in one list, task after task.
        hold_back: Hold back a tenth of the images, on which `Report.fidelity` is measured and methods are compared
            (`fxzip.data.held`). False: all are fitted on. Without refit all are used.
        verify: Check the merge before it is fitted: the first network, merged with a permuted copy of itself, must be
            itself again (`fxzip.passes.verify`). Channel spaces that fail are kept in place, with a warning.
        progress: Show what goes on, how far it is and the memory it takes, in one line on stderr.
        labels: Names of the classes by task; default: those that the models know (timm's ``pretrained_cfg``,
            transformers' ``id2label``). They travel with the network: `ZippedModel.predict`.
        process_group: The processes that share the work, a group of torch.distributed, each calling this with the same
            models and options; every one gets the same network. None: all, where ``init_process_group`` was called or
            ``torchrun`` started several; False: this one alone. Each reads a share of the loader
            (`fxzip.data.shares`).
        resume: A folder for what was done so far (sums of moments, images held back, solved layers). After an
            interruption the same call goes on from there, to the same bits if the loader gives the same images in the
            same order; at the end the files are taken away. None: nothing is kept.
        memory: What the merge may take, as ``"4GB"`` or in bytes. What it needs at the least is estimated before the
            work (`fxzip.memory`), and the rest is used for more images. None: as ``refit`` says.
        stats_device: Where moments are kept, as ``"cpu"`` for networks that fill an accelerator. None: where the
            networks are.
        part: Merge one module only (``"backbone"`` of detectors), as ``get_submodule`` names it: the whole models run
            on the loader's batches up to it, and whole models are given back (`fxzip.zip_part`). It takes none of the
            four above, nor ``stitch``.
        stitch: For two networks that share nothing (a ResNet beside a VGG): the trunk is one of them up to a place, and
            stays as it is; the other goes on from there through a linear map, which is solved for like the layers
            behind it. Where, and which gives the trunk, is found by fidelity. ``cut`` is what both may cost (None:
            ``"flops<=1.5x"``), the fidelity to keep, or the place where the trunk ends. It takes ``refit``, ``effort``,
            ``names``, ``labels``, ``hold_back``, ``verify`` and ``progress`` beside.
        **options: Options of the method: ``alpha`` and ``beta`` of ``zip``, ``gamma`` of ``dual`` and of ``cca``;
            `fxzip.matching.settings_of` says what they do, and their ranges and defaults.

    Raises:
        TraceError, AlignmentError, CutError, CalibrationError, OptionError, VerificationError, ProcessError: see
            `fxzip.errors`.
    """
    wanted: dict[str, Any] = {"cut": cut, "start": start, "method": method, "refit": refit, "progress": progress}
    wanted |= {"verify": verify, "width": width, "budget": budget, "heads": heads, "effort": effort}
    if part is not None:
        whole = {"process_group": process_group, "resume": resume, "memory": memory, "stats_device": stats_device}
        whole["stitch"] = stitch or None
        refused = [name for name, value in whole.items() if value is not None]
        if refused:
            raise OptionError(f"{refused[0]} is for merges of whole networks: leave it out, or leave part={part!r} out")
        wanted |= {"points": points, "hold_back": hold_back, "labels": labels}
        return zip_part(*models, loader=loader, part=part, names=names, **wanted, **options)
    given, loader = models_and_loader(models, loader)
    check_order(given)
    check_models(given)
    each, names = separated(given, names)
    check_merge(zip, len(each), points=points, hold_back=hold_back, **wanted, **options)
    kept = {"resume": resume, "memory": memory, "stats_device": stats_device}
    check_stitch(each, {**wanted, **kept, "stitch": stitch})
    if stitch:
        known = task_names(names, len(each)), labels, process_group
        return _stitched(each, loader, *known, hold_back, **wanted)
    tasks, allowed = task_names(names, len(each)), parse_memory(memory)
    processes = processes_of(process_group)
    processes.hush()
    ready = ready_loader(loader, tasks, each, processes)
    settings = {**wanted, **options, "points": points, "hold_back": hold_back}
    journal = Journal.open(resume, partial(run_of, each, tasks, settings), processes)
    with bar_of(progress if processes.leads else False) as bar:
        shown = bar or False
        if bar is not None:
            bar.phase("tracing and analysing")
        prepared = prepared_of(each, first_batch(ready), tasks, verify, labels, processes, needs_linear(method))
        check_linear(method, prepared.spec)
        prepared.journal = journal
        prepared.place(cut, start, width, budget)
        prepared.check_heads(heads)
        fit = bounded(prepared, allowed, refit_options(refit, effort))
        wanted |= {"progress": shown, "refit": fit or False, "effort": "default"}  # the fit has what the effort says
        some: dict[str, Any] = {"points": points, "hold_back": hold_back and refit is not False}
        prepared.observe(ready, progress=shown, stats_device=stats_device, **some)
        zipped = prepared.convert(**wanted, **options)
    journal.close()
    return zipped


@undisturbed
def prepare(
    *models: nn.Module, example_inputs: Any, names: Iterable[str] | None = None, verify: bool = True,
    labels: Mapping[str, Iterable[str]] | None = None, process_group: Any = None, linearise: bool = False,
) -> Prepared:  # fmt: skip
    """Trace and analyse networks, so that they can be observed once and merged many times.

        prepared = fxzip.prepare(model_a, model_b, example_inputs=images)
        prepared.observe(loader)
        zipped = prepared.convert(cut="layer2", method="permute")

    Args:
        models: Two networks or more; modules or GraphModules.
        example_inputs: Inputs for one of them: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        names: Names of the tasks.
        verify: Check the channel spaces on the example (`fxzip.passes.verify`); spaces that fail are kept in place.
        labels: As for `zip`.
        process_group: As for `zip`.
        linearise: Write LayerNorms and RMSNorms as RMSNorms without scales where that is exact
            (`fxzip.passes.linearise`), as method ``pca`` needs; the models' own classes cannot hold the result.

    Raises:
        TraceError: A model cannot be traced.
        VerificationError: The channel spaces are wrong, and fxzip cannot tell which of them.
        AlignmentError: The models share nothing, or are on different devices.
        OptionError: Fewer than two models, an argument that is not a module, or unusable names.
    """
    check_order(models, "fxzip.prepare(model_a, model_b, example_inputs=images)")
    check_models(models)
    each, names = separated(models, names)
    processes = processes_of(process_group)
    processes.hush()
    check_flag("linearise", linearise)
    return prepared_of(each, example_inputs, task_names(names, len(each)), verify, labels, processes, linearise)


def _stitched(
    each: Sequence[Any], loader: Any, tasks: tuple[str, ...], labels: Mapping[str, Iterable[str]] | None,
    process_group: Any, hold_back: bool, *, cut: Cut, refit: bool | RefitOptions, effort: str, verify: bool,
    progress: bool, **_: Any,
) -> ZippedModel:  # fmt: skip
    """As `zip` with ``stitch=True``, of what was checked.

    Raises:
        OptionError: Several processes would share it.
    """
    if processes_of(process_group).count > 1:
        raise OptionError("stitch=True works in one process: start one, or give process_group=False")
    ready, options = ready_loader(loader, tasks, each), refit_options(refit, effort)
    args, kwargs = ready_example(first_batch(ready), each)
    assert options is not None
    with bar_of(progress) as bar:
        if bar is not None:
            bar.phase("tracing and analysing")
        graphs = [canonicalise(traced(model, args, kwargs)) for model in each]
        example = to_device(args, kwargs, device_of(graphs[0]))
        specs, checked = map(tuple, builtins.zip(*(analysed(graph, example, verify) for graph in graphs), strict=True))
        check_pixels(graphs, tasks, (args, kwargs))
        about = gathered(each, tasks, labels, example)
        stitching = Stitching(tasks, tuple(graphs), specs, checked, ready, options, hold_back, bar or False)
        return stitching.run(cut, about)


@undisturbed
def analyse(model: nn.Module, example_inputs: Any, *, verify: bool = True) -> ChannelSpec:
    """The channel spaces of one network; ``analyse(model, x).permute(model)`` computes what ``model`` does.

    Args:
        model: A module or GraphModule; it is left as it is.
        example_inputs: As for `prepare`.
        verify: As for `prepare`.

    Raises:
        TraceError: The model cannot be traced.
        VerificationError: As for `prepare`.
    """
    args, kwargs = ready_example(example_inputs, [model])
    graph = canonicalise(trace(model, args, kwargs))
    return linearity(graph, analysed(graph, to_device(args, kwargs, device_of(graph)), verify)[0])
