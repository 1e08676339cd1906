"""A folder of checkpoints: each task's merged weights under the keys of its own class (`ZippedModel.as_models`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
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


SHARED = "shared.safetensors"
"""The tensors that all checkpoints of a folder have."""
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
"""What ``save_pretrained`` writes, and what stands for it where the tensors are in several files."""


@undisturbed
def save_models(
    zipped: ZippedModel, folder: str | PathLike[str], *, overwrite: bool = False, once: bool = False
) -> Path:
    """Save for each task a checkpoint that its own class loads: ``TASK.safetensors``.

    Models with a ``save_pretrained`` of their own (Hugging Face's) get a folder ``TASK`` that ``from_pretrained``
    reads. Each file is whole: the trunk's tensors are in all of them. With ``once`` they are on disk once, in
    ``shared.safetensors``, and ``TASK.safetensors`` has the rest:

        model.load_state_dict({**load_file("shared.safetensors"), **load_file("dogs.safetensors")})

    In the folders of Hugging Face models they are a link to that file, and an index that ``from_pretrained`` follows.

    Args:
        zipped: The network.
        folder: Where to; it appears whole or not at all.
        overwrite: Write even into a folder that holds files.
        once: Write the trunk's tensors once.

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
    shared = _shared(models.values()) if once else set()
    with new_folder(path) as fresh:
        if shared:
            first, model = next(iter(models.items()))
            write_tensors(fresh / SHARED, {k: v for k, v in _state(model, first).items() if k in shared})
        for task, model in models.items():
            own: Any = getattr(model, "save_pretrained", None)
            if callable(own):
                own(fresh / task)
                _split_in_two(fresh / task, shared)
            else:
                write_tensors(
                    fresh / f"{task}.safetensors", {k: v for k, v in _state(model, task).items() if k not in shared}
                )
    return path


def _shared(models: Iterable[nn.Module]) -> set[str]:
    """The keys under which all models have the same tensor."""
    first, *others = ({k: v.data_ptr() for k, v in _tensors(model).items()} for model in models)
    return {name for name, place in first.items() if others and all(other.get(name) == place for other in others)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor) and v.numel()}


def _split_in_two(folder: Path, shared: Collection[str]) -> None:
    """Let a Hugging Face folder take some tensors from the file of the folder above.

    A link needs no space; where there are none, the file is copied.
    """
    from safetensors.torch import load_file

    if not shared or not (folder / _WHOLE).is_file():
        return
    tensors = load_file(folder / _WHOLE)
    rest = {name: value for name, value in tensors.items() if name not in shared}
    names = {name: SHARED if name in shared else "own.safetensors" for name in tensors}
    write_tensors(folder / "own.safetensors", rest)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    try:
        os.link(folder.parent / SHARED, folder / SHARED)
    except OSError:
        shutil.copy(folder.parent / SHARED, folder / SHARED)
    (folder / _WHOLE).unlink()


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
