"""Lock step: the parents and the merged network run side by side, node by node, over many batches at once.

At each step all batches that were taken in stand at the same node, so that a layer can be solved on all of them
before any goes on. Values are forgotten when nothing reads them any more. Batches are taken in as they are needed:
where feature maps are large, few are enough.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxzip.data.calibration import Images
from fxzip.data.loops import device_of
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
    """One batch's values in every stream, by the merged graph's node names; empty until it is taken in.

    Attributes:
        feed: The inputs, in every stream.
        number: What `Images.sizes` knows it by.
        place: How many batches come before it, of all processes.
        first: How many images come before it.
        images: How many images (or other samples) there are in it.
        env: The values.
        generator: Draws at random from it; set by `sow`.
    """

    feed: list[dict[str, Any]]
    number: int
    place: int
    first: int
    images: int
    env: list[dict[str, Any]] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def sow(self, *seed: object) -> None:
        """Begin to draw anew: what is drawn does not depend on what other batches or processes drew before."""
        self.generator.manual_seed(zlib.crc32(repr((*seed, self.place)).encode()))


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
        batches: This process's batches.
        sizes: How many images there are in each batch of all processes (`fxzip.data.calibration.Images`).
        active: How many of these have been taken in.
        processes: Those that share the batches.
        steps: The schedule.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        feeds: Sequence[Sequence[dict[str, Any]]],
        steps: Sequence[Step],
        keep: set[str],
        images: Images,
    ) -> None:
        self.streams = list(streams)
        self.sizes, self.processes = images.sizes, images.processes
        self.batches = [
            Batch(list(feed), number, self._taken(number), sum(self.sizes[:number]), self.sizes[number])
            for number, feed in zip(images.numbers, feeds, strict=True)
        ]
        self.active = 0
        self.steps = self._forgetting(steps, keep)

    @property
    def seen(self) -> list[Batch]:
        """This process's batches that were taken in."""
        return [batch for batch in self.batches if batch.number < self.active]

    @property
    def first(self) -> Batch | None:
        """The first batch of all; None where another process has it."""
        number = next(number for number, size in enumerate(self.sizes) if size)
        return next((batch for batch in self.batches if batch.number == number), None)

    @property
    def images(self) -> int:
        """How many images all processes have taken in."""
        return sum(self.sizes[: self.active])

    @property
    def taken(self) -> int:
        """How many batches all processes have taken in."""
        return self._taken(self.active)

    def _taken(self, number: int) -> int:
        return sum(size > 0 for size in self.sizes[:number])

    def total(self, what: str, parts: Sequence[Tensor] | None) -> list[Tensor]:
        """Sums over the processes; None where this one has no batch to take them of."""
        return self.processes.total(what, parts, device_of(self.streams[-1].module))

    def held(self) -> int:
        """Bytes of the values that are kept of the batches taken in, what they share (views) counted once."""
        storages: dict[int, int] = {}
        for batch in self.seen:
            for value in (v for env in batch.env for v in env.values() if isinstance(v, Tensor)):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def run(self, wanted: Callable[[Step | None], int], done: Callable[[], None]) -> None:
        """Take every step.

        Args:
            wanted: How many batches more, of all processes, to solve at a step, or for the end (None); no more than one
                for each process at once.
            done: Called after each step that solved something.
        """
        with torch.no_grad():
            self._take_in(0, 1)
            for number, step in enumerate(self.steps):
                if step.solve is None:
                    for batch in self.seen:
                        self._compute(step, batch)
                    continue
                self._fill(number, partial(wanted, step))
                known = [set(batch.env[-1]) for batch in self.seen]
                step.solve()
                done()
                for batch, names in zip(self.seen, known, strict=True):
                    for name in batch.env[-1].keys() - names:  # what was needed to solve only
                        del batch.env[-1][name]
                    self._forget(step, batch)
            self._fill(len(self.steps), partial(wanted, None))

    def _fill(self, upto: int, wanted: Callable[[], int]) -> None:
        """Take batches in while more are wanted, and there are any."""
        while self.active < len(self.sizes):
            more = wanted()
            if not more:
                break
            self._take_in(upto, more)

    def _take_in(self, upto: int, more: int) -> None:
        """Bring so many more batches, of all processes, to where the others are."""
        before, self.active = self.active, min(self.active + more, len(self.sizes))
        for batch in self.seen:
            if batch.number >= before:
                batch.env = [dict(values) for values in batch.feed]
                for step in self.steps[:upto]:
                    self._compute(step, batch)

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
