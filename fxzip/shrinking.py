"""`shrink`: one trained network made smaller, without training; a merge of one network by the same passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxzip.checks import check_linear, check_merge, check_models, needs_linear
from fxzip.data.bars import bar_of
from fxzip.data.checks import first_batch, ready_loader
from fxzip.errors import OptionError
from fxzip.merged import ZippedModel
from fxzip.names import bad_name
from fxzip.passes.cut import Cut
from fxzip.passes.points import Points
from fxzip.passes.refit import RefitOptions
from fxzip.prepared import Prepared
from fxzip.preparing import prepared_of
from fxzip.processes import processes_of
from fxzip.surroundings import undisturbed
from fxzip.widths import Width


@undisturbed
def shrink(
    model: nn.Module, loader: Iterable[Any], *, width: Width = None, budget: str | None = None, cut: Cut = None,
    method: str = "select", name: str = "model", points: Points = "last", refit: bool | RefitOptions = True,
    effort: str = "default", hold_back: bool = True, verify: bool = True, progress: bool = True,
    process_group: Any = None, **options: Any,
) -> ZippedModel:  # fmt: skip
    """Make a trained network smaller: fewer channels, and weights solved for so that it gives what it gave.

        small = fxzip.shrink(model, loader, budget="flops<=0.5x")
        logits = small(images, task="model")

    Each space keeps the channels that the others are best told from (`fxzip.matching`, ``select``); blocks, as
    attention heads, are kept or left out as wholes. Then each layer is solved in closed form for what the network gives
    (`fxzip.passes.refit`), as ThiNet (arXiv 1707.06342) and others do for one layer at a time. No labels are needed.

    Args:
        model: The network; it is left as it is.
        loader: As for `fxzip.zip`: images like those that it was trained on.
        width: As for `fxzip.zip`: less than 1.
        budget: As for `fxzip.zip`, in multiples of the network.
        cut: As for `fxzip.zip`: what comes after it stays as it is. None: the classifier.
        method: ``select``, ``zip`` (channels that are alike are averaged), or ``auto``.
        name: What the result calls the network.
        points: As for `fxzip.zip`.
        refit: As for `fxzip.zip`.
        effort: As for `fxzip.zip`.
        hold_back: As for `fxzip.zip`.
        verify: As for `fxzip.zip`.
        progress: Show bars.
        process_group: As for `fxzip.zip`.
        **options: Options of the method.

    Returns:
        A network with one task; it is saved, exported and reported as a merge is.

    Raises:
        TraceError, CutError, CalibrationError, OptionError, VerificationError: see `fxzip.errors`.
    """
    wanted: dict[str, Any] = {"cut": cut, "method": method, "refit": refit, "progress": progress, "verify": verify}
    wanted |= {"width": width, "budget": budget, "effort": effort}
    check_models([model], least=1)
    if width is None and budget is None:
        raise OptionError('shrink needs a width or a budget, as width=0.7 or budget="flops<=0.5x"')
    if (wrong := bad_name([name])) is not None:
        raise OptionError(wrong)
    check_merge(Prepared.convert, 1, **wanted, **options)
    processes = processes_of(process_group)
    processes.hush()
    ready = ready_loader(loader, (name,), [model], processes)
    with bar_of(progress if processes.leads else False) as bar:
        shown = bar or False
        if bar is not None:
            bar.phase("tracing and analysing")
        linear = needs_linear(method)
        prepared = prepared_of([model], first_batch(ready), (name,), verify, processes=processes, linear=linear)
        check_linear(method, prepared.spec)
        prepared.place(cut, None, width, budget)
        prepared.observe(ready, points=points, hold_back=hold_back and refit is not False, progress=shown)
        return prepared.convert(**{**wanted, "progress": shown}, **options)
