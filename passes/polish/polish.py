"""Polish: damped Gauss-Newton steps of all layers together, on the heads' outputs.

Refit solves layer after layer, each for what the parents have at its place. That is the best a layer can do alone, but
what is left is shared out badly: an error in a direction that no later layer reads costs as much as one that changes
the answer, and where all blocks write to one residual stream, each puts right what it can of all before. So once every
layer has been solved, all are moved together towards what the parents *answer*: by steps of Gauss and Newton on the
`fxzip.passes.polish.distance` of their outputs, with a Kronecker-factored curvature (`fxzip.passes.polish.curvature`).

The length of a step is no setting: along the step and the one before, the error is a quadratic form, whose minimum is
taken (Martens and Grosse, arXiv 1503.05671, section 7), and halved while it is no gain. There are no labels and no
learning rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Generator

from fxzip.data.bars import Shown
from fxzip.data.batches import Given
from fxzip.data.loops import counted
from fxzip.passes.cut.plan import MergePlan
from fxzip.passes.polish.goal import Goal, in_parts
from fxzip.passes.polish.network import Network
from fxzip.passes.polish.steps import Run, learning, turn
from fxzip.passes.split import Split
from fxzip.settings import RefitOptions


def polish(
    parts: Split, plan: MergePlan, images: Sequence[Given], options: RefitOptions, progress: Shown = True
) -> int:
    """Polish trunk and heads in place; returns how many steps were taken, which are ``options.polish`` at most.

    Args:
        parts: Trunk and heads, as they were fitted.
        plan: What they were built from.
        images: The calibration images.
        options: Of the refit: the steps, the seed, and the memory that the parents' outputs may take.
        progress: Show a bar.
    """
    network = Network(parts.trunk, dict(enumerate(parts.heads)))
    goal = Goal(dict(enumerate(plan.alignment.modules)), in_parts(images), options.memory)
    run = Run(network, goal, Generator().manual_seed(options.seed))
    with learning(network), counted(options.polish, progress, "polishing") as done:
        for number in range(options.polish):
            try:
                gained = run.step(turn(goal.places, number))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an operator without a backward; the step had changed nothing
                reason = str(error).splitlines()[0]
                warnings.warn(f"polish ends, as the network cannot be differentiated: {reason}", stacklevel=2)
                return number
            if not gained:
                return number
            done()
    return options.polish
