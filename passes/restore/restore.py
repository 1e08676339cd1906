"""The restore pass: a merged network's weights under the names of a parent's graph.

Where the merged network computes what the parent's class computes, node by node, its tensors are the parent's. What
refit has folded into a layer is unfolded (`chains`): the BatchNorm behind it gets the statistics 0 and 1, and holds
the bias that the layer cannot. What fxzip has computed from parameters is found again where it was only moved about
(`moves`). What no tensor of the parent's can hold is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzip.errors import RestoreError
from fxzip.graphs import attribute, is_static, linear_of, named_call, nodes_by_name, run_call
from fxzip.passes.restore.chains import Chain, find_chain, is_norm
from fxzip.passes.restore.moves import moved_back, scaled_back
from fxzip.passes.restore.values import Values
from fxzip.rules import target_of


def restore(parts: Mapping[str, fx.GraphModule], names: Mapping[str, str], parent: fx.GraphModule) -> Values:
    """The values of a parent's tensors in the merged network.

    Args:
        parts: The trunk, and the parent's head, by what they are called.
        names: The trunk's names of the nodes before the cut, by the parent's.
        parent: The parent's graph, as it was merged; its parameters need no values.

    Raises:
        RestoreError: The merged network has what no tensor of the parent's can hold.
    """
    return _Restorer(dict(parts), names, parent).run()


@dataclass(eq=False)
class _Restorer:
    """One parent's tensors.

    Attributes:
        parts: Trunk and head.
        names: The trunk's names of the nodes before the cut, by the parent's.
        parent: The parent's graph.
    """

    parts: dict[str, fx.GraphModule]
    names: Mapping[str, str]
    parent: fx.GraphModule

    def __post_init__(self) -> None:
        self.values = Values()
        self.nodes = {part: nodes_by_name(module) for part, module in self.parts.items()}
        self.state = set(self.parent.state_dict())

    def run(self) -> Values:
        """Read all nodes."""
        self._refuse_new_nodes()
        for node in self.parent.graph.nodes:
            for _, merged in self._counterparts(node):
                if "val" in node.meta:  # a graph that was loaded knows no shapes, and rules ask for them
                    merged.meta.setdefault("val", node.meta["val"])
        done: dict[str, set[fx.Node]] = {part: set() for part in self.parts}
        for node in self.parent.graph.nodes:
            for part, merged in self._counterparts(node):
                chain = find_chain(self.parent, node, partial(self._counterpart, part))
                if chain is not None:
                    done[part] |= set(chain.nodes)
                    self._read_chain(chain, part, merged)
                elif node not in done[part]:
                    self._read(node, part, merged)
        self._unfold()
        return self.values

    # ---- which node is which

    def _counterpart(self, part: str, node: fx.Node) -> fx.Node | None:
        """The merged network's node; None where it has none."""
        trunk = part == self._trunk
        name = self.names.get(node.name) if trunk else node.name
        found = self.nodes[part].get(name) if name is not None else None
        return None if found is None or (found.op == "placeholder") != (node.op == "placeholder") else found

    @cached_property
    def _trunk(self) -> str:
        return next(iter(self.parts))

    def _counterparts(self, node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
        for part in self.parts:
            found = self._counterpart(part, node)
            if found is not None:
                yield part, found

    def _refuse_new_nodes(self) -> None:
        """Raise where the merged network does what the parent does not.

        Raises:
            RestoreError: A node is fxzip's own.
        """
        ours = {self._trunk: set(self.names.values())}
        for part, nodes in self.nodes.items():
            known = ours.get(part, {node.name for node in self.parent.graph.nodes})
            new = [n for name, n in nodes.items() if name not in known and n.op not in ("get_attr", "output")]
            if new and part == self._trunk:
                raise RestoreError(
                    f"the trunk has {new[0].name}, which is in no model: where each model keeps its first layers "
                    "(start=...), none of them can hold the trunk; merge from the input"
                )
            if new:
                raise RestoreError(
                    f"the head {part} begins with {new[0].name}: its channels lie elsewhere in the trunk, and behind "
                    "this cut no layer of the model can hold where; cut in front of a convolution or a linear layer"
                )

    # ---- nodes as they are

    def _read(self, node: fx.Node, part: str, merged: fx.Node) -> None:
        if node.op == "call_module":
            self._read_module(node, part, merged)
        elif is_norm(merged):
            self._read_norm(node, part, merged)
        elif node.op in ("call_function", "call_method"):
            self._read_arguments(node, part, merged)

    def _read_module(self, node: fx.Node, part: str, merged: fx.Node) -> None:
        ours = _tensors(self.parent.get_submodule(str(node.target)))
        theirs = _tensors(self.parts[part].get_submodule(str(merged.target)))
        for key, tensor in theirs.items():
            if key in ours:
                self.values.set(f"{node.target}.{key}", (part, f"{merged.target}.{key}"), tensor)
            else:
                self.values.refuse_unless(float(key == "weight"), tensor, f"refit gave {node.target} a {key}")

    def _read_norm(self, node: fx.Node, part: str, merged: fx.Node) -> None:
        """A norm that is a module in the merged network and a function in the parent's."""
        call = named_call(self.parent, node)
        for key, tensor in _tensors(self.parts[part].get_submodule(str(merged.target))).items():
            name = None if call is None else call.parameter(key)
            if name is not None:
                self.values.set(name, (part, f"{merged.target}.{key}"), tensor)

    def _read_arguments(self, node: fx.Node, part: str, merged: fx.Node) -> None:
        module = self.parts[part]
        kept = {n.name: n for n in merged.all_input_nodes if n.op == "get_attr"}
        known = {node.name for node in self.parent.graph.nodes}
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.name in kept:
                target = str(kept[source.name].target)
                self._set(str(source.target), (part, target), attribute(module, target))
        call = named_call(self.parent, node)
        for place, given in _arguments(merged).items():
            if isinstance(given, fx.Node) and given.op == "get_attr" and given.name not in known:
                old = _arguments(node).get(place)
                target = str(given.target)
                if isinstance(old, fx.Node) and is_static(old):
                    self.give(old, (part, target), attribute(module, target))
                else:
                    name = call.names[int(place)] if call is not None and place.isdigit() else place
                    neutral = float(name == "weight")
                    self.values.refuse_unless(neutral, attribute(module, target), f"refit gave {node.name} a {name}")

    def _set(self, name: str, key: tuple[str, ...], tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            self.values.set(name, key, tensor)

    def give(self, static: fx.Node, key: tuple[str, ...], tensor: Tensor) -> None:
        """Give what a static node is made of the values that make it a tensor."""
        if static.op == "get_attr":
            shape = attribute(self.parent, str(static.target)).shape
            self._set(str(static.target), key, tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor)
            return
        sources = _sources(static)
        names = [str(n.target) for n in sources if str(n.target) in self.state]

        self._give_moved(static.name, partial(_static_run, self.parent, static), names, key, tensor)

    def _give_moved(self, what: str, run: Any, names: list[str], key: tuple[str, ...], tensor: Tensor) -> None:
        shapes = {name: self._shape(name) for name in names}
        found = moved_back(run, shapes, tensor)
        scaled = scaled_back(run, shapes, tensor) if found is None else None
        if scaled is not None:
            found = scaled, True
        if found is None:
            raise RestoreError(
                f"{what} is computed from {', '.join(names)}, and which of their values give the merged one fxzip "
                "cannot tell: such a layer can be merged, but not put back into its class"
            )
        for name, value in found[0].items():
            self.values.set(name, (*key, name), value)
            if not found[1]:
                self.values.doubts[name] = f"no value of it makes {what} what the merged network has"

    def _shape(self, name: str) -> torch.Size:
        folds = self.parent.meta.get("folds", {})
        for fold in folds.values():
            if name in fold.shapes:
                return torch.Size(fold.shapes[name])
        return torch.Size(attribute(self.parent, name).shape)

    # ---- what was folded

    def _read_chain(self, chain: Chain, part: str, merged: fx.Node) -> None:
        module = self.parts[part]
        linear = linear_of(module, merged)
        assert linear is not None
        for name, label, tensor in chain.unfolded(module, merged, linear, self._counterpart(part, chain.nodes[1])):
            if isinstance(name, fx.Node):
                self.give(name, (part, *label), tensor)
            else:
                self._set(name, (part, *label), tensor)

    def _unfold(self) -> None:
        """Replace the values of what was computed from parameters by those of the parameters."""
        for name, fold in self.parent.meta.get("folds", {}).items():
            value = self.values.found.pop(name, None)
            if value is not None:
                self._give_moved(fold.what, fold.run, list(fold.shapes), value.key, value.tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(named)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by place or name."""
    return {**{str(place): value for place, value in enumerate(node.args)}, **node.kwargs}


def _sources(node: fx.Node) -> list[fx.Node]:
    """The attributes that a static node is made of."""
    if node.op == "get_attr":
        return [node]
    return list(dict.fromkeys(source for given in node.all_input_nodes for source in _sources(given)))


def _static_run(module: fx.GraphModule, node: fx.Node, given: Mapping[str, Tensor]) -> Any:
    """What a static node gives for other values of its attributes."""
    if node.op == "get_attr":
        return given.get(str(node.target), attribute(module, str(node.target)))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _static_run(module, source, given))
    return run_call(target_of(module, node), args, kwargs)
