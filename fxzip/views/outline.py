"""Outline: what a merged network computes, layer by layer, and the blocks that a reader wants to see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxzip.flops import flop_counter
from fxzip.graphs import bind_inputs, placeholders
from fxzip.passes.cut import is_layer
from fxzip.report import LayerRow
from fxzip.rules import target_of
from fxzip.rules.keys import key_of

FEW = 24
"""Up to so many blocks, modules that are no mere lists of others are opened."""

MOST = 64
"""Up to so many blocks, lists of modules (``layer1.0``, ``layer1.1`` ...) are opened."""


def outline(
    trunk: fx.GraphModule,
    heads: Mapping[str, fx.GraphModule],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spaces: Callable[[str], tuple[str, ...]],
) -> tuple[LayerRow, ...]:
    """Run a merged network on one example, and write down its layers.

    Args:
        trunk: The trunk.
        heads: The heads, by task.
        args: Positional inputs, of one example.
        kwargs: Keyword inputs.
        spaces: The merged channel spaces of a node's output in the trunk, by the node's name.
    """
    rows: list[LayerRow] = []
    inputs = tuple(bind_inputs(trunk, args, kwargs).values())
    recorder = _Recorder(trunk, "", rows, spaces)
    crossing = recorder.run_all(inputs, {})
    (outputs,) = trunk.graph.output_node().args
    assert isinstance(outputs, tuple)
    origins = [recorder.rows_of[node] for node in outputs if isinstance(node, fx.Node)]
    for task, head in heads.items():
        given = dict(zip(placeholders(head), origins, strict=True))
        _Recorder(head, task, rows, lambda _: ()).run_all(crossing, given)
    return tuple(rows)


class _Recorder(fx.Interpreter):
    """Runs one part of the network, and adds a row for each layer, each sum and each end.

    Whatever costs nothing and has one input belongs to the row before it.
    """

    def __init__(
        self, module: fx.GraphModule, part: str, rows: list[LayerRow], spaces: Callable[[str], tuple[str, ...]]
    ) -> None:
        super().__init__(module)
        self.graph_module, self.part, self.rows, self.spaces = module, part, rows, spaces
        self.rows_of: dict[fx.Node, tuple[int, ...]] = {}
        self._pending: dict[fx.Node, int] = {}  # parameters that a get_attr node brings to its first user
        self._counted: set[int] = set()
        self._counter = flop_counter()

    def run_all(self, inputs: tuple[Any, ...], origins: Mapping[fx.Node, tuple[int, ...]]) -> Any:
        """Run the part; ``origins`` are the rows that its inputs come from, where there are any."""
        self.rows_of.update(origins)
        with torch.no_grad(), self._counter:
            return self.run(*inputs)

    def run_node(self, node: fx.Node) -> Any:
        """Run a node, and give it a row of its own, or those of its input."""
        before = self._counter.get_total_flops()
        result = super().run_node(node)
        if node not in self.rows_of:
            self.rows_of[node] = self._place(node, result, int(self._counter.get_total_flops() - before))
        return result

    def _place(self, node: fx.Node, result: Any, flops: int) -> tuple[int, ...]:
        if node.op == "get_attr":
            self._pending[node] = self._params(self.fetch_attr(str(node.target)))
            return ()
        sources = tuple(dict.fromkeys(row for source in node.all_input_nodes for row in self.rows_of[source]))
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return ()  # a size
        if node.op == "output":
            return self._add(node, sources, result, 0, 0) if self.part else ()
        params = sum(self._pending.pop(source, 0) for source in node.all_input_nodes)
        if node.op == "call_module":
            params += self._params(self.fetch_attr(str(node.target)))
        if not flops and not params and len(sources) == 1:
            if isinstance(result, Tensor) and self.rows[sources[0]].part == self.part:
                self.rows[sources[0]] = replace(self.rows[sources[0]], shape=_shape(result))
            return sources
        if not sources and node.op != "placeholder":  # computed from parameters alone
            self._pending[node] = params
            return ()
        return self._add(node, sources, result, params, flops)

    def _add(self, node: fx.Node, sources: tuple[int, ...], result: Any, params: int, flops: int) -> tuple[int]:
        target = target_of(self.module, node)
        if node.op in ("placeholder", "output"):
            name, kind, spaces = node.name, "input" if node.op == "placeholder" else "output", tuple[str, ...]()
        else:
            key = key_of(target)
            kind = type(target).__name__ if isinstance(target, nn.Module) else str(getattr(key, "__name__", key))
            name, spaces = _name(node), self.spaces(node.name)
        layer = is_layer(self.graph_module, node)
        self.rows.append(LayerRow(name, kind, self.part, layer, sources, spaces, _shape(result), params, flops))
        return (len(self.rows) - 1,)

    def _params(self, owner: Any) -> int:
        """Parameters of a module or tensor that were not counted before."""
        owned = owner.parameters() if isinstance(owner, nn.Module) else [owner]
        fresh = [p for p in owned if isinstance(p, nn.Parameter) and id(p) not in self._counted]
        self._counted.update(map(id, fresh))
        return sum(p.numel() for p in fresh)


def _shape(result: Any) -> tuple[int, ...]:
    return tuple(result.shape[1:]) if isinstance(result, Tensor) else ()


def _name(node: fx.Node) -> str:
    """The module that a node calls, or the node's own name behind the innermost module around it."""
    if node.op == "call_module":
        return str(node.target)
    around = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return ".".join((*around[-1:], node.name))


# ---- blocks: rows of one module together


@dataclass(frozen=True)
class Block:
    """What a drawing shows as one box: neighbouring rows of one module.

    Attributes:
        name: The module.
        part: As in `LayerRow`.
        rows: The rows in it.
        inputs: Places in the list of blocks of those whose results it takes.
    """

    name: str
    part: str
    rows: tuple[LayerRow, ...]
    inputs: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The kind of its only row; ``module`` for several."""
        return self.rows[0].kind if len(self.rows) == 1 else "module"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its result, for one example."""
        return self.rows[-1].shape

    @property
    def params(self) -> int:
        """Its parameters."""
        return sum(row.params for row in self.rows)

    @property
    def flops(self) -> int:
        """Its floating-point operations on one example."""
        return sum(row.flops for row in self.rows)

    @property
    def spaces(self) -> tuple[str, ...]:
        """The merged channel spaces of its result."""
        return next((row.spaces for row in reversed(self.rows) if row.spaces), ())

    @property
    def inner(self) -> tuple[str, ...]:
        """All merged channel spaces that its layers produce."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.spaces))


def blocks(rows: Sequence[LayerRow], few: int = FEW, most: int = MOST) -> tuple[Block, ...]:
    """The rows by module, in such detail as stays readable.

    Lists of modules (whose parts are numbered) are opened while there are at the most ``most`` blocks in the
    trunk and one head, then whole levels of other modules while there are at the most ``few``. What costs nothing
    and has one input joins the block before it.
    """
    opened: set[str] = set()
    while True:
        opened = _open_lists(rows, opened, most)
        closed = _closed(rows, opened)
        if not closed:
            break
        level = min(name.count(".") for name in closed)
        wider = _open_lists(rows, opened | {name for name in closed if name.count(".") == level}, most)
        if _length(_gather(rows, wider)) > few:
            break
        opened = wider
    return _gather(rows, opened)


def _open_lists(rows: Sequence[LayerRow], opened: set[str], most: int) -> set[str]:
    """Open the modules whose parts are numbered, or that have one part only."""
    tried: set[str] = set()
    while True:
        for name, parts in _closed(rows, opened).items():
            if name not in tried and (len(parts) == 1 or all(part.isdigit() for part in parts)):
                tried.add(name)
                if _length(_gather(rows, opened | {name})) <= most:
                    opened = opened | {name}
                break
        else:
            return opened


def _closed(rows: Sequence[LayerRow], opened: set[str]) -> dict[str, set[str]]:
    """The modules that are shown as one block and have rows inside, with the names of their parts."""
    found: dict[str, set[str]] = {}
    for row in rows:
        key = _key(row.name, opened)
        if len(key) < len(row.name):
            found.setdefault(key, set()).add(row.name[len(key) + 1 :].split(".")[0])
    return found


def _key(name: str, opened: set[str]) -> str:
    parts = name.split(".")
    for count in range(1, len(parts)):
        if (prefix := ".".join(parts[:count])) not in opened:
            return prefix
    return name


def _length(found: Sequence[Block]) -> int:
    """Blocks from the input to the farthest output: the trunk's, and those of the longest head."""
    count: dict[str, int] = {}
    for block in found:
        count[block.part] = count.get(block.part, 0) + 1
    return count.pop("", 0) + max(count.values(), default=0)


def _gather(rows: Sequence[LayerRow], opened: set[str]) -> tuple[Block, ...]:
    """Neighbouring rows of one module as a block; rows that cost nothing go to the block before them.

    Rows are in the order of execution, so blocks of neighbours form no cycle.
    """
    found: list[Block] = []
    block_of: list[int] = []
    for row in rows:
        key = _key(row.name, opened)
        inputs = tuple(dict.fromkeys(block_of[i] for i in row.inputs))
        mine = _home(found, row, key, inputs)
        if mine == len(found):
            found.append(Block(key, row.part, (row,), inputs))
        else:
            outside = tuple(dict.fromkeys((*found[mine].inputs, *(i for i in inputs if i != mine))))
            found[mine] = replace(found[mine], rows=(*found[mine].rows, row), inputs=outside)
        block_of.append(mine)
    return tuple(found)


def _home(found: Sequence[Block], row: LayerRow, key: str, inputs: tuple[int, ...]) -> int:
    """The block that a row joins, or the number of the next one."""
    if row.kind in ("input", "output"):
        return len(found)
    if found and (found[-1].part, found[-1].name) == (row.part, key) and found[-1].kind != "input":
        return len(found) - 1
    if not row.flops and not row.layer and len(inputs) == 1 and key == row.name:
        before = found[inputs[0]]
        if before.part == row.part and before.kind != "input":
            return inputs[0]
    return len(found)
