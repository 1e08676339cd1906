"""Lock step: the parents and the merged network run side by side, node by node, over many batches at once.

At each step all batches that were taken in stand at the same node, so that a layer can be solved on all of them
before any goes on. Values are forgotten when nothing reads them any more. Batches are taken in as they are needed:
where feature maps are large, few are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.data.batches import batch_size
from fxzip.graphs import attribute, compute, nodes_by_name


@dataclass(eq=False)
class Stream:
    """One network of the lock step; ``names`` maps the merged graph's node names to this one's."""

    module: fx.GraphModule
    names: Mapping[str, str]
    back: dict[str, str] = field(init=False)
    nodes: dict[str, fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.back = {own: name for name, own in self.names.items()}
        self.reload()

    def reload(self) -> None:
        """See the graph as it is now."""
        self.nodes = nodes_by_name(self.module)

    def compute(self, name: str, env: Mapping[str, Any]) -> Any:
        """The value of a node, its inputs being in ``env`` under the merged graph's names."""

        def value(n: fx.Node) -> Any:
            return attribute(self.module, str(n.target)) if n.op == "get_attr" else env[self.back.get(n.name, n.name)]

        return compute(self.module, self.nodes[self.names.get(name, name)], value)

    def reads(self, name: str) -> list[str]:
        """The merged graph's names of what a node is computed from; none if this network lacks the node."""
        node = self.nodes.get(self.names.get(name, name))
        return [self.back.get(n.name, n.name) for n in node.all_input_nodes] if node is not None else []

    def has(self, name: str) -> bool:
        """Whether this network has the node (gathers are the merged one's alone)."""
        return self.names.get(name, name) in self.nodes


@dataclass(eq=False)
class Batch:
    """One batch's values in every stream, by the merged graph's node names; empty until it is taken in."""

    feed: list[dict[str, Any]]
    env: list[dict[str, Any]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many images (or other samples) there are in it."""
        return batch_size((), self.feed[-1])


@dataclass(frozen=True, eq=False)
class Step:
    """Compute a node in some streams, or solve at it; then forget what is used up.

    Attributes:
        node: The merged network's node.
        streams: The networks to compute it in.
        solve: Called instead of computing, when all batches that are needed have arrived.
        samples: How many samples there are in a value of the node that is solved at.
        reads: Further nodes whose values ``solve`` needs.
        forget: The values that nothing needs after the step: the number of the network, and the name.
    """

    node: fx.Node
    streams: slice = field(default_factory=lambda: slice(None))
    solve: Callable[[], None] | None = None
    samples: Callable[[Tensor], int] | None = None
    reads: tuple[fx.Node, ...] = ()
    forget: tuple[tuple[int, str], ...] = ()


class LockStep:
    """The run of several networks, the last of which is the merged one, through a schedule of steps.

    Attributes:
        streams: The networks.
        batches: All batches; the first ``active`` of them have been taken in.
        steps: The schedule.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        feeds: Sequence[Sequence[dict[str, Any]]],
        steps: Sequence[Step],
        keep: set[str],
    ) -> None:
        self.streams = list(streams)
        self.batches = [Batch(list(feed)) for feed in feeds]
        self.active = 0
        self.steps = self._forgetting(steps, keep)

    @property
    def seen(self) -> list[Batch]:
        """The batches that were taken in."""
        return self.batches[: self.active]

    def held(self) -> int:
        """Bytes of the values that are kept of the batches taken in, what they share (views) counted once."""
        storages: dict[int, int] = {}
        for batch in self.seen:
            for value in (v for env in batch.env for v in env.values() if isinstance(v, Tensor)):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def run(self, enough: Callable[[Step | None], bool], done: Callable[[], None]) -> None:
        """Take every step.

        Args:
            enough: Whether the batches that were taken in suffice to solve at a step, or for the end (None).
            done: Called after each step that solved something.
        """
        with torch.no_grad():
            self._take_in(0)
            for number, step in enumerate(self.steps):
                if step.solve is None:
                    for batch in self.seen:
                        self._compute(step, batch)
                    continue
                while self.active < len(self.batches) and not enough(step):
                    self._take_in(number)
                step.solve()
                done()
                for batch in self.seen:
                    self._forget(step, batch)
            while self.active < len(self.batches) and not enough(None):
                self._take_in(len(self.steps))

    def _take_in(self, upto: int) -> None:
        """Bring one more batch to where the others are."""
        batch = self.batches[self.active]
        batch.env = [dict(values) for values in batch.feed]
        for step in self.steps[:upto]:
            self._compute(step, batch)
        self.active += 1

    def _compute(self, step: Step, batch: Batch) -> None:
        if step.solve is None and step.node.op not in ("placeholder", "get_attr"):
            for stream, env in list(zip(self.streams, batch.env, strict=True))[step.streams]:
                if stream.has(step.node.name):
                    env[step.node.name] = stream.compute(step.node.name, env)
        self._forget(step, batch)

    @staticmethod
    def _forget(step: Step, batch: Batch) -> None:
        for number, name in step.forget:
            batch.env[number].pop(name, None)

    def _forgetting(self, steps: Sequence[Step], keep: set[str]) -> list[Step]:
        """Mark for each value of each network the last step that reads it."""
        last: dict[tuple[int, str], int] = {}
        merged = len(self.streams) - 1
        for place, step in enumerate(steps):
            name = step.node.name
            if step.solve is not None:
                needed = {(number, name) for number in range(merged + 1)}
                needed |= {(merged, node.name) for node in step.reads}
            else:
                computed = range(merged + 1)[step.streams]
                needed = {(k, read) for k in computed for read in (name, *self.streams[k].reads(name))}
            last |= dict.fromkeys(needed, place)
        done: dict[int, list[tuple[int, str]]] = {}
        for value, place in last.items():
            if value[1] not in keep:
                done.setdefault(place, []).append(value)
        return [replace(step, forget=tuple(done.get(place, ()))) for place, step in enumerate(steps)]
