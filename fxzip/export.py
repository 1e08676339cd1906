"""Export: a merged network as an ONNX file or a program of torch.export, with a batch size of its own choice.

What was written is read again and compared with the network on the spot, at two batch sizes.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.data.batches import Inputs, batch_size, model_inputs, to_device, with_batch_size
from fxzip.data.loops import device_of, evaluating
from fxzip.errors import ExportError, OptionError
from fxzip.exported import input_names, onnx_runner, output_names, tensors_in
from fxzip.folders import replace_files, scratch_folder
from fxzip.graphs import placeholders
from fxzip.onnx_names import metadata, write_names
from fxzip.surroundings import undisturbed, unheard

if TYPE_CHECKING:
    from os import PathLike

    from fxzip.merged import ZippedModel

CHECKED = (1, 3)
"""The batch sizes at which what was written is compared."""

_TRACED = 2
_TOLERANCES = {torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_TOLERANCE = 2e-3
_ONNX_LIMIT = 1_900_000_000


@dataclass(frozen=True)
class Export:
    """What an export gave.

    Attributes:
        path: The file.
        difference: The largest difference between the network and the file, relative to the output's largest value.
        inputs: The names of the inputs.
        outputs: The names of the outputs, one for each tensor.
    """

    path: Path
    difference: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        sizes = " and ".join(map(str, CHECKED))
        return (
            f"{self.path}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}; "
            f"differs from the network by at most {self.difference:.1e}, at batch sizes {sizes}"
        )


@undisturbed
def export(
    zipped: ZippedModel,
    path: str | PathLike[str],
    *,
    task: str | None = None,
    opset: int | None = None,
    example_inputs: Any = None,
) -> Export:
    """Export a merged network, and check the file against it.

        zipped.export("m.onnx")            # an output for each task, named as the tasks
        zipped.export("m.pt2", task="a")   # torch.export.load("m.pt2").module()(images)

    Args:
        zipped: The network.
        path: The file; its ending says what it is: ``.onnx`` or ``.pt2``.
        task: Export one head only.
        opset: Version of ONNX's operators; default: the one that torch chooses.
        example_inputs: A tensor, a tuple of inputs or a dict of keyword inputs; default: the merge's own.

    Returns:
        The path, the largest difference, and the names of inputs and outputs. The outputs of a task whose
        output is a structure are called ``TASK.key`` or ``TASK_0``.

    Raises:
        OptionError: The path has another ending, there is no such task, or no example.
        ExportError: A package is missing, the path cannot be written, or the export fails or differs too
            much; no file is left then.
    """
    path = Path(path).absolute()
    _check_options(zipped, path, task, opset)
    example = _example(zipped, example_inputs)
    with scratch_folder(path.parent, ExportError) as scratch, evaluating(zipped), torch.no_grad():
        folder = scratch / "new"
        folder.mkdir()
        with _as_export_error(path):
            names, difference = _write(zipped, folder / path.name, task, opset, example)
        allowed = _tolerance(zipped)
        if not difference <= allowed:
            raise ExportError(
                f"{path.name} would differ from the network by {difference:.1e}, more than the allowed {allowed:.0e}"
            )
        replace_files(folder, path.parent, scratch)
    return Export(path, difference, *names)


class Served(nn.Module):
    """A merged network as it is exported: one task or all; a flat tuple of tensors if ``flat``."""

    def __init__(self, zipped: ZippedModel, task: str | None, flat: bool) -> None:
        super().__init__()
        self.zipped = zipped
        self.task = task
        self.flat = flat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        outputs = self.zipped(*args, task=self.task, **kwargs)
        return tuple(tensors_in(outputs)) if self.flat else outputs


# ---- what is asked for


def _check_options(zipped: ZippedModel, path: Path, task: str | None, opset: int | None) -> None:
    if path.suffix not in (".onnx", ".pt2"):
        raise OptionError(f"{path.name}: an export ends in .onnx (ONNX) or .pt2 (torch.export)")
    if opset is not None and path.suffix != ".onnx":
        raise OptionError(f"opset={opset} is for .onnx files")
    if task is not None:
        zipped.head(task)
    if path.is_dir():
        raise OptionError(f"{path} is a folder: give a file")
    needed = ("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"an export to ONNX needs {' and '.join(missing)}: pip install 'fxzip[onnx]'")


def _example(zipped: ZippedModel, given: Any) -> Inputs:
    """Inputs of two samples, where the network is; torch.export takes a size of one for a constant."""
    if given is not None:
        inputs: Inputs = model_inputs(given) if not isinstance(given, (tuple, list)) else (tuple(given), {})
    elif zipped.example is not None:
        inputs = zipped.example
    else:
        raise OptionError("the network has no example of its inputs: give example_inputs")
    args, kwargs = with_batch_size(*inputs, _TRACED)
    return to_device(args, kwargs, device_of(zipped))


# ---- writing


def _write(
    zipped: ZippedModel, path: Path, task: str | None, opset: int | None, example: Inputs
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], float]:
    """Write the file, and give the names of inputs and outputs, and the largest difference."""
    served = Served(zipped, task, flat=path.suffix == ".onnx")
    outputs = zipped(*example[0], task=task, **example[1])
    names = input_names(zipped, example), output_names(zipped, task, outputs)
    if path.suffix == ".onnx":
        said = metadata(zipped, zipped.names if task is None else (task,))
        run = _to_onnx(served, example, path, names, opset, said)
    else:
        run = _to_program(served, example, path)
    return names, max(_difference(served, with_batch_size(*example, size), run) for size in CHECKED)


def _dynamic(example: Inputs, names: Sequence[str]) -> dict[str, Any]:
    """What torch.export may not take for constant: the batch, on axis 0 of the tensors that have it."""
    size, batch = batch_size(*example), torch.export.Dim("batch", min=1)

    def axes(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else None

    args, kwargs = pytree.tree_map(axes, example)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _to_program(served: Served, example: Inputs, path: Path) -> Any:
    # torch's writer aborts the process where the disk is full: it writes to memory.
    content = io.BytesIO()
    torch.export.save(_exported(served, example), content)
    path.write_bytes(content.getbuffer())
    program = torch.export.load(path).module()
    return lambda args, kwargs: tensors_in(program(*args, **kwargs))


def _exported(served: Served, example: Inputs) -> torch.export.ExportedProgram:
    args, kwargs = example
    module = _with_signature(served, len(args))
    names = [str(node.target) for node in placeholders(module)]
    return torch.export.export(module, args, kwargs, dynamic_shapes=_dynamic(example, names), strict=False)


def _with_signature(served: Served, positional: int) -> fx.GraphModule:
    """The network with its inputs by name: torch.export makes wrong guards of ``**kwargs``."""
    graph = fx.Graph()
    names = [str(node.target) for node in placeholders(served.zipped.trunk)]
    inputs = {name: graph.placeholder(name) for name in names}
    args = tuple(inputs[name] for name in names[:positional])
    kwargs: dict[str, Any] = {name: inputs[name] for name in names[positional:]}
    graph.output(graph.call_module("served", args, kwargs))
    return fx.GraphModule({"served": served}, graph)


def _to_onnx(
    served: Served, example: Inputs, path: Path, names: tuple[Sequence[str], Sequence[str]], opset: int | None,
    said: Mapping[str, str],
) -> Any:  # fmt: skip
    program = _exported(served, example)
    size = sum(tensor.nbytes for tensor in (*served.parameters(), *served.buffers()))
    torch.onnx.export(
        program,
        f=path,
        input_names=list(names[0]),
        output_names=list(names[1]),
        opset_version=opset,
        external_data=size > _ONNX_LIMIT,
        verbose=False,
        dynamo=True,
    )
    write_names(path, said)
    return onnx_runner(path, list(names[0]), list(names[1]))


# ---- checking


def _difference(served: Served, inputs: Inputs, run: Any) -> float:
    """The largest difference of one batch's outputs, over the largest size of each output."""
    expected, found = tensors_in(served(*inputs[0], **inputs[1])), run(*inputs)
    return max(_relative(a.detach().cpu(), b.detach().cpu()) for a, b in zip(expected, found, strict=True))


def _relative(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise ExportError(f"it gives the shape {list(found.shape)} in place of {list(expected.shape)}")
    if expected.dtype != found.dtype:
        raise ExportError(f"it gives {found.dtype} in place of {expected.dtype}")
    a, b = expected.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs())
    if not gap.numel():
        return 0.0
    size = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else torch.ones(())
    return float(gap.max() / size.clamp(min=1e-12))


def _tolerance(zipped: ZippedModel) -> float:
    kinds = {tensor.dtype for tensor in (*zipped.parameters(), *zipped.buffers()) if tensor.is_floating_point()}
    return max((_TOLERANCES.get(kind, _TOLERANCE) for kind in kinds), default=_TOLERANCE)


@contextmanager
def _as_export_error(path: Path) -> Iterator[None]:
    """Failures of torch and onnxruntime in one line, and their chatter unheard."""
    try:
        with warnings.catch_warnings(), unheard():
            warnings.simplefilter("ignore")
            yield
    except (ExportError, OSError) as error:
        raise ExportError(f"{path.name} cannot be exported: {error}") from error
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # torch.onnx's own message is a page that says how to report it
            root = root.__cause__
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(root)).split())
        raise ExportError(f"{path.name} cannot be exported: {type(root).__name__}: {reason[:300]}") from error
