"""Cut: where the trunk may end and the heads begin.

The cut is a place in the order of the shared nodes, which is the order of execution: any prefix is a trunk.
A place is valid where every tensor that crosses it can be unmerged, channel by channel, along one axis.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

from torch import fx

from fxzip.channels import ChannelSpec
from fxzip.errors import CutError
from fxzip.passes.align import Alignment
from fxzip.rules import find_rule, kind_of, target_of

Cut = str | float | None


@dataclass(frozen=True, eq=False)
class Cuts:
    """The places where models may be cut.

    Attributes:
        named: The place of each module and node that heads can begin at, in graph order.
        valid: The valid places, ascending; a place is the number of shared nodes before it.
        default: The last valid place before the classifiers, before layers that cannot be merged, and before the
            models diverge.
        layers: The places just before each layer with weights, in the first model's whole graph.
        reason: Why the default is not later.
    """

    named: dict[str, int]
    valid: tuple[int, ...]
    default: int
    layers: tuple[int, ...]
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """The valid cuts, by the outermost module that begins there."""
        found: dict[int, str] = {}
        valid = {place for place in self.valid if place <= self.default}
        for name, place in self.named.items():
            if place in valid:
                found.setdefault(place, name)
        return tuple(found.values())

    def resolve(self, cut: Cut, what: str = "cut") -> int:
        """The place that a user's cut means.

        Args:
            cut: Name of the module or node that the heads begin at; the largest share (0 to 1) of the layers that
                the trunk may have (0: it is empty); None for the default.
            what: The name of the argument, for messages.

        Raises:
            CutError: The name is unknown, or nothing can be cut there; the nearest valid ones are named.
        """
        check_cut(cut, what)
        if cut is None:
            return self.default
        if isinstance(cut, str):
            return self._by_name(cut, what)
        count = round(cut * len(self.layers))
        place = min([*self.layers[count:], self.default]) if count else self.valid[0]
        return max(p for p in self.valid if p <= place)

    def _by_name(self, cut: str, what: str) -> int:
        if cut not in self.named:
            near = difflib.get_close_matches(cut, self.names, n=5, cutoff=0.3) or list(self.names[:5])
            raise CutError(f"{what}={cut!r}: no shared module or node of that name; valid nearby: {', '.join(near)}")
        place = self.named[cut]
        if place in self.valid and place <= self.default:
            return place
        near = sorted(self.names, key=lambda name: abs(self.named[name] - place))[:4]
        verb = "end" if what == "cut" else what
        where = (
            "a tensor that crosses there has channels that are kept in place, bundled, or only part of a channel space"
        )
        if place > self.default:
            where = self.reason
        raise CutError(
            f"{what}={cut!r}: the trunk cannot {verb} there because {where}; valid nearby: {', '.join(near)}"
        )


def check_cut(cut: object, what: str = "cut") -> None:
    """Raise what is wrong with a cut in any network.

    Args:
        cut: What a user gave.
        what: What it is called.

    Raises:
        CutError: It is neither a name nor a share nor None, or the share is out of range.
    """
    if cut is None or isinstance(cut, str):
        return
    if isinstance(cut, bool) or not isinstance(cut, Real):
        raise CutError(f"{what}={cut!r}: give the name of a module or node, a share of the layers (0 to 1), or None")
    if not 0 <= cut <= 1:  # type: ignore[operator, unused-ignore]
        raise CutError(f"{what}={cut!r}: a share of the layers lies between 0 and 1")


def find_cuts(alignment: Alignment, spec: ChannelSpec) -> Cuts:
    """All places where aligned models may be cut.

    Raises:
        CutError: There is none, even before the first layer.
    """
    shared = [names[0] for names in alignment.shared]
    number = {name: i for i, name in enumerate(shared)}
    nodes = alignment.nodes[0]
    inputs = sum(nodes[name].op == "placeholder" for name in shared)
    invalid = set(range(inputs))
    for i, last in _last_uses(alignment).items():
        if not _can_cross(spec, shared[i]):
            invalid.update(range(i + 1, last + 1))
    valid = tuple(place for place in range(len(shared) + 1) if place not in invalid)
    if not valid:
        raise CutError(f"the models cannot be cut anywhere: {alignment.parting or 'no tensor can cross'}")
    end, reason = min(_ends(alignment, spec))
    layers = tuple(
        number.get(node.name, len(shared)) for node in nodes.values() if is_layer(alignment.modules[0], node)
    )
    default = max((place for place in valid if place <= end), default=valid[0])
    return Cuts(dict(_named(alignment.modules[0], number)), valid, default, layers, reason)


def _ends(alignment: Alignment, spec: ChannelSpec) -> Iterator[tuple[int, str]]:
    """The places that limit the default cut, each with the reason."""
    yield len(alignment.shared), alignment.parting or "the models end there"
    for model, module in enumerate(alignment.modules):
        of = {names[model]: i for i, names in enumerate(alignment.shared)}
        for node in classifiers(module):
            if node.name in of:
                yield (
                    of[node.name],
                    f"the classifiers begin at {node.target if node.op == 'call_module' else node.name}",
                )
    for i, names in enumerate(alignment.shared):
        node = alignment.nodes[0][names[0]]
        if _cannot_be_merged(alignment.modules[0], node, spec):
            kind = type(target_of(alignment.modules[0], node)).__name__
            yield i, f"fxzip has no rule for the {kind} {node.target}, whose units it cannot merge (see register_rule)"


def _cannot_be_merged(module: fx.GraphModule, node: fx.Node, spec: ChannelSpec) -> bool:
    """Whether a node calls a module with a parameter of which neither a rule nor trying it says where channels lie."""
    if node.op != "call_module" or find_rule(target_of(module, node)) is not None:
        return False
    own = {f"{node.target}.{name}" for name, p in target_of(module, node).named_parameters() if p.numel() > 1}
    return not own <= {site.parameter for space in spec.spaces for site in space.sites}


def crossing(alignment: Alignment, cut: int) -> tuple[int, ...]:
    """Which of the shared nodes before ``cut`` are used after it in some model; ascending."""
    found: set[int] = set()
    for model, module in enumerate(alignment.modules):
        number = {names[model]: i for i, names in enumerate(alignment.shared[:cut])}
        own = alignment.learned[model]
        for node in module.graph.nodes:
            if node.name in number and node.name not in own and any(u.name not in number for u in node.users):
                found.add(number[node.name])
    return tuple(sorted(found))


def _last_uses(alignment: Alignment) -> dict[int, int]:
    """For each shared node the last shared place that still needs it; beyond the end if a head does."""
    end = len(alignment.shared)
    last: dict[int, int] = {}
    for model, module in enumerate(alignment.modules):
        number = {names[model]: i for i, names in enumerate(alignment.shared)}
        own = alignment.learned[model]
        for node in module.graph.nodes:
            if node.name in number and node.name not in own:
                i = number[node.name]
                last[i] = max(last.get(i, i), *(number.get(user.name, end) for user in node.users), i)
    return last


def _can_cross(spec: ChannelSpec, node: str) -> bool:
    if node in spec.layout.bundles or not spec.is_whole(node):
        return False
    for factor in spec.layout.factors.get(node, ()):
        if sum(size > 1 for size in factor.shape) > 1 or bool(spec.layout.frozen[factor].any()):
            return False
    return True


def is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node contracts channels with weights."""
    if kind_of(target_of(module, node)) != "layer":
        return False
    return node.op == "call_module" or any(n.op == "get_attr" for n in node.all_input_nodes)


def classifiers(module: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The last layers: those whose channels are the network's outputs."""
    pending = list(module.graph.output_node().all_input_nodes)
    seen, found = set(pending), []
    while pending:
        node = pending.pop()
        unknown = node.op == "call_module" and find_rule(target_of(module, node)) is None
        if unknown or is_layer(module, node):
            found.append(node)
            continue
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return tuple(found)


def _named(module: fx.GraphModule, number: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Names of modules, outer ones first, and of nodes, each with the place of its first node.

    The first node that is not shared has a name too: the heads may begin there.
    """
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "output":
            return
        if node.op in ("placeholder", "get_attr") and node.name in number:
            continue
        place = number.get(node.name, len(number))
        for name in (*_modules_around(node), node.name):
            if name not in seen:
                seen.add(name)
                yield name, place
        if node.name not in number:
            return


def _modules_around(node: fx.Node) -> Iterator[str]:
    """The qualified names of the modules that a node is in, outer ones first."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if path:
            yield str(path)
    if node.op == "call_module":
        parts = str(node.target).split(".")
        yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
