"""A GraphModule as JSON: its nodes, its tree of modules; and back, without running anything of what is read.

torch.fx writes Python source for a graph, with names and keywords as they are. So whatever ends up there is
an ASCII identifier, a function of the closed list of `targets`, or the repr of a plain value.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.errors import FileFormatError, SaveError
from fxzip.plan import targets
from fxzip.plan.layers import layer_classes, make_layer, write_layer
from fxzip.plan.safe import safe_graph
from fxzip.plan.values import decode, encode, words

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_PART = re.compile(r"[A-Za-z0-9_]{1,200}")
# Names that the source of a graph uses itself, so that no node or input may be called so.
_TAKEN = frozenset(words("self torch operator math getattr slice device inf nan NoneType fx_pytree pytree"))
_MODULE = frozenset(dir(nn.Module()))
_MOST_ARGUMENTS = {"placeholder": 1, "get_attr": 0, "output": 1}
_KINDS = ("parameters", "buffers", "transient")


def write_graph(module: fx.GraphModule) -> dict[str, Any]:
    """The nodes and the modules of a GraphModule.

    Raises:
        SaveError: Something in it cannot be saved; the node or module is named.
    """
    try:
        modules = list(_write_modules(module))
    except FileFormatError as error:
        raise SaveError(f"the network cannot be saved: {error}") from error
    return {"nodes": [_write_node(node) for node in safe_graph(module.graph).nodes], "modules": modules}


def read_graph(entry: Any, name: str, most: int) -> fx.GraphModule:
    """The GraphModule that `write_graph` wrote, in eval mode; its tensors are on the meta device.

    Args:
        entry: What was written.
        name: The name of its class.
        most: The most tensors that it can have, as no more are saved.

    Raises:
        FileFormatError: It has more tensors, is not what `write_graph` writes, or it calls what it may not.
    """
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), list) for key in ("nodes", "modules")):
        raise FileFormatError("a graph has no nodes or no modules")
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=name)
    modules: dict[str, nn.Module] = {"": module}
    for part in entry["modules"]:
        most -= _read_module(modules, part)
        if most < 0:
            raise FileFormatError("its modules have more tensors than were saved")
    graph = _read_nodes(_Known.of(modules), entry["nodes"])
    try:
        graph.lint()
        module.graph = graph
    except Exception as error:
        raise FileFormatError(f"the nodes make no graph: {error}") from error
    return module.eval()


@dataclass(frozen=True)
class _Known:
    """What nodes may call and get."""

    layers: frozenset[str]
    tensors: frozenset[str]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module]) -> _Known:
        classes = set(layer_classes().values())
        layers = frozenset(path for path, part in modules.items() if type(part) in classes)
        return cls(layers, frozenset(tensors_of(modules[""])))


# ---- nodes


def _write_node(node: fx.Node) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = {
            "name": _checked_name(node.name),
            "op": node.op,
            "target": _write_target(node),
        }
        entry["args"] = [encode(value) for value in node.args]
        entry["kwargs"] = {_checked_key(key): encode(value) for key, value in node.kwargs.items()}
        if node.op == "call_function":
            targets.check_arguments(node.target, node.args, node.kwargs)
    except (SaveError, FileFormatError) as error:
        raise SaveError(f"node {node.name} cannot be saved: {error}") from error
    return entry


def _write_target(node: fx.Node) -> str:
    if node.op == "call_function":
        name = targets.name_of(node.target)
        if name is None:
            kind = getattr(node.target, "__module__", "") or ""
            shown = f"{kind}.{getattr(node.target, '__name__', node.target)}".strip(".")
            raise SaveError(f"it calls {shown}, which is not a function of torch that fxzip knows to be safe to load")
        return name
    target = str(node.target)
    if node.op == "call_method" and target not in targets.methods():
        raise SaveError(f"it calls the method {target}, which fxzip does not know to be safe to load")
    if node.op == "placeholder":
        _checked_name(target)
    if node.op in ("get_attr", "call_module"):
        _checked_path(target)
    return target


def _read_nodes(known: _Known, entries: list[Any]) -> fx.Graph:
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise FileFormatError("a node has no name")
        name = _checked_name(entry["name"])
        if name in nodes:
            raise FileFormatError(f"two nodes are called {name}")
        try:
            nodes[name] = _read_node(known, graph, entry, nodes)
        except FileFormatError as error:
            raise FileFormatError(f"node {name}: {error}") from error
    ops = [node.op for node in graph.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise FileFormatError("the nodes do not end with one output")
    return graph


def _read_node(known: _Known, graph: fx.Graph, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
    op, target = entry.get("op"), entry.get("target")
    raw_args, raw_kwargs = entry.get("args"), entry.get("kwargs")
    if not isinstance(target, str) or not isinstance(raw_args, list) or not isinstance(raw_kwargs, dict):
        raise FileFormatError("its target, args or kwargs are missing")
    args = tuple(decode(value, nodes) for value in raw_args)
    kwargs = {_checked_key(key): decode(value, nodes) for key, value in raw_kwargs.items()}
    found = _read_target(known, op, target)
    if op == "call_function":
        targets.check_arguments(found, args, kwargs)
    elif op == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise FileFormatError("a method is called on something that is not a node")
    elif op in _MOST_ARGUMENTS and (kwargs or len(args) > _MOST_ARGUMENTS[op] or (op == "output" and not args)):
        raise FileFormatError(f"a node of the kind {op} does not take such arguments")
    return graph.create_node(str(op), found, args, kwargs, name=entry["name"])


def _read_target(known: _Known, op: object, target: str) -> Any:
    """What a node calls, if it may."""
    if op == "call_function":
        return targets.find_function(target)
    if op == "call_method" and target not in targets.methods():
        raise FileFormatError(f"it calls the method {target!r}, which a saved graph may not")
    if op == "placeholder":
        return _checked_name(target)
    if op == "call_module" and _checked_path(target) not in known.layers:
        raise FileFormatError(f"there is no layer {target}")
    if op == "get_attr" and _checked_path(target) not in known.tensors:
        raise FileFormatError(f"there is no tensor {target}")
    if op not in ("call_method", "call_module", "get_attr", "output") or (op == "output" and target != "output"):
        raise FileFormatError(f"{op!r} {target!r} is not a kind of node that a saved graph may have")
    return target


# ---- modules


def _write_modules(module: fx.GraphModule) -> Iterator[dict[str, Any]]:
    """All modules, parents first: layers by what makes them, the others by their own tensors."""
    called = {str(node.target) for node in module.graph.find_nodes(op="call_module")}
    for path, part in module.named_modules(remove_duplicate=False):
        if path:
            _checked_path(path)
        if path in called:
            yield {"path": path, **write_layer(path, part)}
        elif not any(path.startswith(f"{layer}.") for layer in called):
            own = {key for key, tensor in part._buffers.items() if tensor is not None}
            kept = own - part._non_persistent_buffers_set
            yield {
                "path": path,
                "parameters": [key for key, tensor in part._parameters.items() if tensor is not None],
                "buffers": [key for key in part._buffers if key in own],
                "transient": sorted(own - kept),
            }


def _read_module(modules: dict[str, nn.Module], entry: Any) -> int:
    """Add one module to the tree, and give the number of its tensors."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise FileFormatError("a module has no path")
    path = entry["path"]
    try:
        if path == "":
            return len(tensors_of(_add_tensors(modules[""], entry)))
        owner, _, name = _checked_path(path).rpartition(".")
        if owner not in modules or hasattr(modules[owner], name):
            raise FileFormatError("it has no parent, or is listed twice")
        modules[path] = make_layer(entry) if "class" in entry else _add_tensors(nn.Module(), entry)
        modules[owner].add_module(name, modules[path])
        return len(tensors_of(modules[path]))
    except FileFormatError as error:
        raise FileFormatError(f"module {path!r}: {error}") from error


def _add_tensors(module: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Give a module its own tensors, empty as yet."""
    names = {kind: entry.get(kind) for kind in _KINDS}
    for kind, found in names.items():
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise FileFormatError(f"its {kind} are not a list of names")
        for name in found if kind != "transient" else ():
            if "." in _checked_path(name) or hasattr(module, name):
                raise FileFormatError(f"a tensor cannot be called {name!r}")
            empty = torch.empty(0, device="meta")
            if kind == "parameters":
                module.register_parameter(name, nn.Parameter(empty))
            else:
                module.register_buffer(name, empty, persistent=name not in (names["transient"] or ()))
    return module


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that are not in the state dict included."""
    named = module.named_parameters(remove_duplicate=False)
    return {**dict(named), **dict(module.named_buffers(remove_duplicate=False))}


# ---- names


def _checked_key(name: str) -> str:
    if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise FileFormatError(f"{name[:60]!r} cannot be a name")
    return name


def _checked_name(name: str) -> str:
    if _checked_key(name) in _TAKEN:
        raise FileFormatError(f"a node cannot be called {name!r}")
    return name


def _checked_path(path: str) -> str:
    for part in path.split("."):
        if not _PART.fullmatch(part) or keyword.iskeyword(part) or part in _MODULE or part.startswith("__"):
            raise FileFormatError(f"{path[:60]!r} cannot be the name of a module or tensor")
    return path
