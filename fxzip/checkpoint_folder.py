"""A folder of checkpoints: each task's merged weights under the keys of its own class (`ZippedModel.as_models`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxzip.errors import SaveError
from fxzip.folders import new_folder
from fxzip.io import write_tensors
from fxzip.surroundings import undisturbed

if TYPE_CHECKING:
    from os import PathLike

    from fxzip.merged import ZippedModel


@undisturbed
def save_models(zipped: ZippedModel, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Save for each task a checkpoint that its own class loads: ``TASK.safetensors``.

    Models with a ``save_pretrained`` of their own (Hugging Face's) get a folder ``TASK`` that ``from_pretrained``
    reads.
    Each file is whole: the trunk's tensors are in all of them.

    Args:
        zipped: The network.
        folder: Where to; it appears whole or not at all.
        overwrite: Write even into a folder that holds files.

    Returns:
        The folder.

    Raises:
        SaveError: The folder holds files, or cannot be written to.
        RestoreError: As for `ZippedModel.as_models`.
    """
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise SaveError(f"{path} holds other files: choose another folder, or give overwrite=True")
    models = zipped.as_models()
    with new_folder(path) as fresh:
        for task, model in models.items():
            own: Any = getattr(model, "save_pretrained", None)
            if callable(own):
                own(fresh / task)
            else:
                write_tensors(fresh / f"{task}.safetensors", _state(model, task))
    return path


def _state(model: nn.Module, task: str) -> dict[str, Tensor]:
    """What ``load_state_dict`` takes, each tensor with memory of its own.

    Raises:
        SaveError: A module keeps something else than tensors.
    """
    state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise SaveError(f"{task}: {strange[0]} of the state dict is no tensor, which a .safetensors file cannot hold")
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
