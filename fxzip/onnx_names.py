"""What an ONNX file says of itself: names that are the network's own, a free batch, and what travels with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel

_PREFIX = "served.zipped."
_SCOPES = "pkg.torch.onnx.name_scopes"


def metadata(zipped: ZippedModel, names: tuple[str, ...]) -> dict[str, str]:
    """What the file's ``metadata_props`` hold, each value JSON: tasks, classes, and how images are prepared.

    Args:
        zipped: The network.
        names: The tasks that are exported.
    """
    information = zipped.information.some(names)
    found: dict[str, Any] = {"tasks": list(names), "labels": information.labels}
    if information.preparation.config:
        found["preparation"] = asdict(information.preparation)
    return {f"fxzip.{key}": json.dumps(value) for key, value in found.items()}


def write_names(path: Path, said: Mapping[str, str]) -> None:
    """Give the weights and nodes of a file the names of the network's layers, and the file its metadata.

    What torch notes on each node (lines of source, paths of this machine) is taken out.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for tensor in graph.initializer:
        tensor.name = tensor.name.removeprefix(_PREFIX)
    # Weights say their shapes themselves: said twice, quantisers that transpose them leave the old ones behind.
    own = {tensor.name for tensor in graph.initializer}
    kept = [info for info in graph.value_info if info.name.removeprefix(_PREFIX) not in own]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    symbols: dict[str, str] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = symbols.setdefault(axis.dim_param, "batch" if not symbols else axis.dim_param)
    taken: set[str] = set()
    for node in graph.node:
        node.input[:] = [name.removeprefix(_PREFIX) for name in node.input]
        node.name = _unused(_name(node), taken)
        taken.add(node.name)
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del value.metadata_props[:]
    del graph.metadata_props[:]
    onnx.helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, **said})
    onnx.save(model, path)


def _name(node: Any) -> str:
    """A node's name: the layer that it is in, and what it does."""
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    own = node.name.removeprefix("node_")
    around = [part.removeprefix(_PREFIX) for part in parts[:-1] if part.startswith(_PREFIX)]
    return f"{around[-1]}/{own}" if around else own


def _unused(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number, found = number + 1, f"{name}_{number}"
    return found
