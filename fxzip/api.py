"""What users call: `zip` in one go, or `prepare`, `observe` and `convert` step by step, and `analyse`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxzip.channels import ChannelSpec
from fxzip.data.batches import given_inputs, model_inputs, to_device
from fxzip.data.loaders import as_one_loader
from fxzip.data.loops import device_of
from fxzip.errors import AlignmentError, CalibrationError, OptionError
from fxzip.merged import ZippedModel
from fxzip.passes.align import align
from fxzip.passes.analyse import analyse_graph
from fxzip.passes.canonicalise import canonicalise
from fxzip.passes.cut import Cut, find_cuts
from fxzip.passes.points import Which
from fxzip.passes.refit import RefitOptions
from fxzip.passes.trace import trace
from fxzip.prepared import Prepared, check_method, check_models, task_names

Loader = Iterable[Any]


def zip(
    *models: Any, loader: Loader | None = None, cut: Cut = None, start: Cut = None, method: str = "zip",
    alpha: float | None = None, beta: float | None = None, names: Iterable[str] | None = None, points: Which = "last",
    refit: bool = True, ridge: float = RefitOptions.ridge, rounds: int = RefitOptions.rounds,
    images: int = RefitOptions.images, progress: bool = True, **others: Any,
) -> ZippedModel:  # fmt: skip
    """Merge trained networks of one architecture into one with a shared trunk and a head for each.

        zipped = fxzip.zip(model_a, model_b, loader)
        logits_a, logits_b = zipped(images)

    Args:
        models: Two networks or more, then the loader. They are left as they are.
        loader: Images like those that the networks were trained on, of all tasks, no labels needed: it gives tensors,
            tuples or lists whose first element is the input, or dicts of keyword inputs. It is read more than once.
            Or a loader for each network: a list of them, or a dict by the tasks' names.
        cut: The module or node that the heads begin at, a share (0 to 1) of the layers for the trunk, a budget
            (``"flops<=1.3x"`` of one network: the earliest cut that meets it), or None for everything up to where
            the models part or their classifiers begin.
        start: The module or node that merging starts at, or a share (0 to 1) of the layers: what comes before is run
            as each network has it, side by side. None: at the input.
        method: ``zip``, ``select``, ``permute``, ``average``, ``optimal``, ``weights``, ``dual`` or ``cca`` (see
            `fxzip.matching`).
        alpha: For ``zip``: how readily merged channels merge again (arXiv 2305.03053, section 4.3), 0 to 1.
        beta: For ``zip``: budget of merges within one model, 0 to 1.
        names: Names of the tasks; ``task0``, ``task1`` ... without.
        points: One merge point for each space (``last``), or ``all`` of them pooled.
        refit: Solve each merged layer in closed form, so that it gives what the parents give on the loader's images
            (`fxzip.passes.refit`); False: the paper's rule, and BatchNorm statistics are reset.
        ridge: For ``refit``: how much the weights are held to the paper's rule, as a share of the inputs' power.
        rounds: For ``refit``: how often the layers of a branch are solved in turn for what it gives (in the heads
            once, at the most); 0 solves each layer once, which is faster.
        images: For ``refit``: most images that it takes from the loader; the more, the closer and the slower.
        progress: Show bars.
        others: Further options of the method, ``gamma`` of ``dual`` and of ``cca``.

    Raises:
        TraceError, AlignmentError, CutError, CalibrationError, OptionError: see `fxzip.errors`.
    """
    given, loader = _models_and_loader(models, loader)
    check_models(given)
    check_method(method, {"alpha": alpha, "beta": beta, **others}, len(given))
    tasks = task_names(names, len(given))
    loader = as_one_loader(loader, tasks)
    prepared = prepare(*given, example_inputs=_first_batch(loader), names=tasks)
    prepared.place(cut, start)
    prepared.observe(loader, points=points, progress=progress)
    return prepared.convert(
        cut=cut, start=start, method=method, alpha=alpha, beta=beta, refit=refit, ridge=ridge, rounds=rounds,
        images=images, progress=progress, **others,
    )  # fmt: skip


def prepare(*models: nn.Module, example_inputs: Any, names: Iterable[str] | None = None) -> Prepared:
    """Trace and analyse networks, so that they can be observed once and merged many times.

        prepared = fxzip.prepare(model_a, model_b, example_inputs=images)
        prepared.observe(loader)
        zipped = prepared.convert(cut="layer2", method="permute")

    Args:
        models: Two networks or more; modules or GraphModules.
        example_inputs: What one of them takes: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        names: Names of the tasks.

    Raises:
        TraceError: A model cannot be traced.
        AlignmentError: The models share nothing, or are on different devices.
        OptionError: Fewer than two models, something that is no module, or unusable names.
    """
    check_models(models)
    tasks = task_names(names, len(models))
    args, kwargs = given_inputs(example_inputs)
    alignment = align([canonicalise(trace(model, args, kwargs)) for model in models])
    if not alignment.shared_parameters():
        raise AlignmentError(f"the models share no layer: {alignment.parting}")
    example = to_device(args, kwargs, device_of(alignment.modules[0]))
    spec = analyse_graph(alignment.modules[0], *example)
    return Prepared(tasks, alignment, spec, find_cuts(alignment, spec))


def analyse(model: nn.Module, example_inputs: Any) -> ChannelSpec:
    """The channel spaces of one network; ``analyse(model, x).permute(model)`` computes what ``model`` does.

    Args:
        model: A module or GraphModule; it is left as it is.
        example_inputs: As for `prepare`.

    Raises:
        TraceError: The model cannot be traced.
    """
    args, kwargs = given_inputs(example_inputs)
    traced = canonicalise(trace(model, args, kwargs))
    return analyse_graph(traced, *to_device(args, kwargs, device_of(traced)))


def _models_and_loader(given: tuple[Any, ...], loader: Loader | None) -> tuple[tuple[nn.Module, ...], Loader]:
    if loader is None:
        if not given or isinstance(given[-1], nn.Module):
            raise OptionError("no loader: call fxzip.zip(model_a, model_b, loader)")
        *given_models, loader = given
        given = tuple(given_models)
    assert loader is not None
    return given, loader


def _first_batch(loader: Loader) -> tuple[Any, ...] | dict[str, Any]:
    """The first batch, as example inputs."""
    try:
        iterator = iter(loader)
    except TypeError:
        kind = type(loader).__name__
        raise CalibrationError(f"the loader is a {kind}, which gives no batches; use a DataLoader or a list") from None
    if iterator is loader:
        raise CalibrationError(
            "the loader can be read only once, and it is read several times: use a DataLoader or a list"
        )
    for batch in iterator:
        args, kwargs = model_inputs(batch)
        return kwargs or args
    raise CalibrationError("the loader is empty: it gave no batch")
