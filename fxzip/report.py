"""Reports: values that print as tables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxzip.fidelity import Fidelity

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from rich.table import Table

    from fxzip.channels import ChannelSpec
    from fxzip.sweep import Sweep


@dataclass(frozen=True)
class SpaceRow:
    """How one channel space was merged.

    Attributes:
        name: The space.
        size: Channels of each model in it.
        sites: How many parameters' axes it lies on.
        correlation: Mean correlation of the matched pairs of channels; None if none was observed or matched.
        within: Share of the matched pairs that lie within one model.
        merged: Channels of the trunk in it; None where there are as many.
    """

    name: str
    size: int
    sites: int
    correlation: float | None
    within: float
    merged: int | None = None


@dataclass(frozen=True)
class Cost:
    """Parameters, and floating-point operations (a multiply-add counts two) for one example."""

    params: int
    flops: int


@dataclass(frozen=True)
class LayerRow:
    """A step of the merged network: a layer or a sum, with what follows it on the same tensor.

    Attributes:
        name: The module, or the operation by the module that it is in.
        kind: Class of the module, or name of the operation.
        part: Task of the head that it is in; empty in the trunk.
        layer: Whether weights contract channels there.
        inputs: Places in `Report.layers` of the rows whose results it takes.
        spaces: The merged channel spaces of its result.
        shape: Of its result, for one example.
        params: Parameters.
        flops: Floating-point operations on one example.
    """

    name: str
    kind: str
    part: str
    layer: bool
    inputs: tuple[int, ...]
    spaces: tuple[str, ...]
    shape: tuple[int, ...]
    params: int
    flops: int


@dataclass(frozen=True)
class Verified:
    """What was checked, and how far it was off, as shares of the outputs' largest value.

    Attributes:
        dtype: The dtype of the computation.
        permutation: Of the network with permuted channels.
        merge: Of the network merged with its permuted copy as asked for; None where nothing is merged.
        ensemble: Of the heads behind an empty trunk.
        frozen: The channel spaces that were found to be to blame for a difference, and are kept in place.
    """

    dtype: str
    permutation: float
    merge: float | None = None
    ensemble: float | None = None
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"permuted {self.permutation:.1e}"]
        parts += [f"merged with itself {self.merge:.1e}"] if self.merge is not None else []
        parts += [f"side by side {self.ensemble:.1e}"] if self.ensemble is not None else []
        return f"{', '.join(parts)} off, in {self.dtype}"


STITCH = "stitch"
"""The method of networks of which one goes on from the other's features (`fxzip.stitching`)."""


@dataclass(frozen=True)
class Report:
    """What was merged, and what it costs; printed as a table.

    Attributes:
        names: The tasks.
        method: The matcher, with its options.
        cut: Where the heads begin, as the user named it.
        traced_by: How each model was traced.
        parting: Where and why the models diverge; None if they do not.
        spaces: The merged channel spaces.
        frozen: Names of the spaces in the trunk that an operation keeps in place, with the reasons.
        coverage: Share of the first model's weight elements that lie in a channel space; where networks were stitched,
            of the one that gives the trunk.
        before: Cost of each model.
        trunk: Cost of the trunk.
        heads: Cost of each head.
        recalibrated: BatchNorm layers whose statistics were reset.
        refitted: Layers whose weights were solved for.
        layers: What the network computes, in the order of execution, the trunk first.
        start: Where merging starts, as the user named it; None for the input.
        verified: What was checked before the fit, and how far it was off; None where it was not.
        fidelity: How well it answers as its parents do; None where no image was held back to measure it.
        tried: What method ``auto`` tried, and what each gave.
        width: How wide the trunk is, as the user wanted it; None where it is as wide as a model.
    """

    names: tuple[str, ...]
    method: str
    cut: str
    traced_by: tuple[str, ...]
    parting: str | None
    spaces: tuple[SpaceRow, ...]
    frozen: tuple[str, ...]
    coverage: float
    before: tuple[Cost, ...]
    trunk: Cost
    heads: tuple[Cost, ...]
    recalibrated: int = 0
    refitted: int = 0
    layers: tuple[LayerRow, ...] = ()
    start: str | None = None
    verified: Verified | None = None
    fidelity: Fidelity | None = None
    tried: tuple[str, ...] = ()
    width: str | None = None

    @property
    def where(self) -> str:
        """What is merged, in words."""
        where = f"cut at {self.cut}" if self.start is None else f"merged from {self.start} to {self.cut}"
        return where if self.width is None else f"{where}, width {self.width}"

    @property
    def params_before(self) -> int:
        """Parameters of all models."""
        return sum(cost.params for cost in self.before)

    @property
    def params_after(self) -> int:
        """Parameters of the trunk and all heads."""
        return self.trunk.params + sum(cost.params for cost in self.heads)

    @property
    def flops_before(self) -> int:
        """Floating-point operations of all models on one example."""
        return sum(cost.flops for cost in self.before)

    @property
    def flops_after(self) -> int:
        """Floating-point operations of the trunk and all heads on one example."""
        return self.trunk.flops + sum(cost.flops for cost in self.heads)

    def to_html(self, path: str | PathLike[str], *, sweep: Sweep | None = None) -> Path:
        """Write the report as one HTML page that needs no other file; see `fxzip.views.page.write_page`."""
        from fxzip.views.page import write_page

        return write_page(self, path, sweep=sweep)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        from fxzip.views.page import fragment

        return fragment(self)

    def __str__(self) -> str:
        title = f"{' + '.join(self.names)}: {self.method}, {self.where}"
        spaces = new_table(title, "space", "channels", "sites", "correlation", "within models")
        for row in self.spaces:
            shown = "-" if row.correlation is None else f"{row.correlation:.3f}"
            size = str(row.size) if row.merged is None else f"{row.size} -> {row.merged}"
            spaces.add_row(row.name, size, str(row.sites), shown, f"{row.within:.1%}")
        costs = new_table("", "", "before", "after", "ratio")
        for label, before, after, unit, scale in (
            ("parameters", self.params_before, self.params_after, "M", 1e6),
            ("FLOPs", self.flops_before, self.flops_after, "G", 1e9),
        ):
            ratio = f"{after / before:.3f}" if before else "-"
            costs.add_row(label, f"{before / scale:.3f} {unit}", f"{after / scale:.3f} {unit}", ratio)
        lines = [f"kept in place: {name}" for name in self.frozen]
        lines += [f"the models diverge: {self.parting}"] if self.parting else []
        lines += [f"verified: {self.verified}"] if self.verified else []
        lines += [f"layers refitted: {self.refitted}"] if self.refitted else []
        lines += [f"BatchNorm layers reset: {self.recalibrated}"] if self.recalibrated else []
        lines += [f"method chosen from: {each}" for each in self.tried]
        lines += [f"fidelity: {self.fidelity}"] if self.fidelity else []
        return render(spaces, costs) + "\n".join(lines) + "\n"


def spec_table(spec: ChannelSpec) -> str:
    """The channel spaces of a network as a table."""
    title = f"{len(spec.spaces)} channel spaces cover {spec.coverage:.2%} of the weights"
    asked = any(space.bent != type(space).bent for space in spec.spaces)  # else it is the default
    table = new_table(title, "space", "channels", "sites", *["linear"] * asked, "in blocks of")
    for space in spec.spaces:
        linear = ["yes" if space.linear else ""] * asked
        table.add_row(space.name, str(space.size), str(len(space.sites)), *linear, space.parent or "")
    text = render(table)
    if spec.frozen:
        frozen = new_table("kept in place", "channels of", "number", "why")
        for row in spec.frozen:
            frozen.add_row(row.name, str(row.size), row.reason)
        text += render(frozen)
    if spec.probed:
        probed = new_table("found by trial, as there is no rule", "operation and channels")
        for sentence in spec.probed:
            probed.add_row(sentence)
        text += render(probed)
    return text


def new_table(title: str, *columns: str) -> Table:
    """An empty table of fxzip's looks: the first column left, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def render(*tables: Any, width: int = 110) -> str:
    """Tables as plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False)
    for table in tables:
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
