"""The folders that `tests.fuzz.files` begins with, and what it does to them."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip import io
from fxzip.passes.trace import trace
from fxzip.passes.trace.export import export
from fxzip.plan import targets
from fxzip.plan.layers import layer_classes
from tests.fxzip.served import Small, hand_made

Plan = dict[str, Any]


class Mixed(nn.Module):
    """Recurrent, attending, indexing, of several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.embed = nn.LSTM(4, 4, batch_first=True), nn.GroupNorm(2, 4), nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")
        self.conv.stride = (2,)
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        y = self.conv(self.norm(x) * self.scale) + self.embed(ids).transpose(1, 2)[..., :3]
        z, _ = self.lstm(y.transpose(1, 2))
        w = F.scaled_dot_product_attention(z, z, z).softmax(-1)
        w = F.interpolate(F.pad(w, (1, 1)), size=5).view(x.size(0), -1)
        return {"w": w, "rest": [torch.cat([y, y * 2], 1).permute(0, 2, 1), torch.zeros(2, 3), torch.arange(4)]}


def seeds(folder: Path) -> list[Path]:
    """A few small folders, made in one if they are not there."""
    names = ("merged", "mixed", "exported")
    if not folder.exists():
        torch.manual_seed(0)
        x, ids = torch.randn(2, 4, 6), torch.randint(0, 7, (2, 6))
        images = torch.randn(4, 3, 12, 12)
        mixed = trace(Mixed().eval(), (x, ids))
        fxzip.zip(Small(5), Small(7), [images], progress=False).save(folder / names[0])
        made = hand_made(export(Small().eval(), ((images[:2],), {})), x=images[:2])
        made.save(folder / names[2])
        _two_inputs(mixed, x, ids).save(folder / names[1])
    return [folder / name for name in names]


def _two_inputs(mixed: Any, x: Tensor, ids: Tensor) -> fxzip.ZippedModel:
    """A network whose trunk passes two inputs on."""
    made = hand_made(mixed)
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"), graph.placeholder("ids")))
    trunk = torch.fx.GraphModule(nn.Module(), graph)
    return fxzip.ZippedModel(trunk, {"one": mixed}, made.report, ((x, ids), {})).eval()


def changed(sources: list[Path], number: int, folder: Path) -> Path:
    """The folder of a number: one of the sources, changed; it replaces the one before.

    Args:
        sources: What `seeds` gave.
        number: The same number gives the same change.
        folder: Where the folder is put; hostile code would make a file ``canary`` there.
    """
    draw = random.Random(number)
    place = folder / "changed"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(draw.choice(sources), place)
    kind = draw.choices((_plan, _text, _bytes, _weights), (16, 2, 1, 2))[0]
    kind(place, draw, folder)
    return place


# ---- the kinds of change


def _plan(place: Path, draw: random.Random, folder: Path) -> None:
    """A plan that says something else, with hashes that are right."""
    plan = json.loads((place / io.PLAN).read_text())
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choices((_value, _call, _shape, _words), (5, 5, 2, 2))[0](plan, draw, folder)
    _write(place, plan)


def _write(place: Path, plan: Plan) -> None:
    plan["sha256"] = io.plan_hash(plan)
    (place / io.PLAN).write_text(json.dumps(plan))


def _text(place: Path, draw: random.Random, _: Path) -> None:
    """JSON that is none, or more than it should be."""
    text = (place / io.PLAN).read_text()
    at = draw.randrange(len(text))
    colon = text.find(": ", at)
    deep = draw.choice((70, 900, 50_000))
    inserted = draw.choice((
        '"version": 1, ', "[" * deep + "]" * deep, '{"a":' * deep, "1" * 5000, "1e999", "NaN", "-Infinity",
        "\\ud800", "\x00",
    ))  # fmt: skip
    where = draw.choice((at, colon + 2, 1))
    (place / io.PLAN).write_text(text[:where] + inserted + text[where:], errors="replace")


def _bytes(place: Path, draw: random.Random, _: Path) -> None:
    """Flipped bits, or a file that ends too soon; the hashes do not fit."""
    path = place / draw.choice((io.PLAN, io.WEIGHTS))
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        del content[at:]
    else:
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _weights(place: Path, draw: random.Random, _: Path) -> None:
    """A file of tensors whose header or numbers are others, with hashes that are right."""
    path = place / io.WEIGHTS
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    for _i in range(draw.choice((1, 1, 3))):
        what = draw.random()
        at = draw.randrange(8, 8 + size) if what < 0.6 else draw.randrange(8 + size, len(content))
        if what < 0.1:
            content[draw.randrange(8)] ^= 1 << draw.randrange(8)
        elif what < 0.4:
            content[at] ^= 1 << draw.randrange(8)
        elif what < 0.6:
            content[at : at + 2] = b"%d" % draw.randrange(10, 100)
        elif what < 0.9:
            content[at : at + 4] = draw.choice((b"\xff" * 4, b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\x80"))
        else:
            del content[at:]
            break
    path.write_bytes(content)
    import hashlib

    plan = json.loads((place / io.PLAN).read_text())
    plan["weights"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(place, plan)


# ---- changes of a plan


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a value: what holds it, and its key."""
    found, left = [], [value]
    while left:
        part = left.pop()
        keys = part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            found.append((part, key))
            left.append(part[key])
    return found


def _any(plan: Plan, draw: random.Random) -> tuple[Any, Any]:
    """One place, half of the time in a graph's nodes."""
    graphs = [plan.get("trunk"), *(plan.get("heads") or ())]
    where: Any = draw.choice([g for g in graphs if isinstance(g, dict)] or [plan]) if draw.random() < 0.6 else plan
    return draw.choice(_places(where) or _places(plan))


def _value(plan: Plan, draw: random.Random, folder: Path) -> None:
    """Some value replaced, removed, doubled or swapped with another."""
    holder, key = _any(plan, draw)
    what = draw.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.3:
        other, its = _any(plan, draw)
        holder[key], other[its] = other[its], json.loads(json.dumps(holder[key]))
    elif what < 0.4 and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))
    elif what < 0.5 and isinstance(holder, dict):
        holder[draw.choice(_strings(folder))] = holder.pop(key)
    elif isinstance(holder[key], int) and what < 0.8:
        holder[key] = holder[key] + draw.choice((-1, 1, 2)) if what < 0.65 else draw.choice(NUMBERS)
    else:
        holder[key] = draw.choice((draw.choice(NUMBERS), draw.choice(_strings(folder)), draw.choice(_values())))


def _call(plan: Plan, draw: random.Random, folder: Path) -> None:
    """A node that calls something else, or with other arguments."""
    nodes = [node for node in _nodes(plan) if node.get("op") in ("call_function", "call_method", "call_module")]
    if not nodes:
        return
    node = draw.choice(nodes)
    arguments = node["args"] if isinstance(node.get("args"), list) else []
    if draw.random() < 0.6:
        op = draw.choice(("call_function", "call_method"))
        names = _functions() if op == "call_function" else sorted(targets.methods())
        node.update(
            op=op, target=draw.choice(names) if draw.random() < 0.9 else draw.choice(_strings(folder)), kwargs={}
        )
    for _ in range(draw.randrange(4)):
        extra = draw.choice((draw.choice(NUMBERS), draw.randrange(-2, 5), draw.choice(_values())))
        place = draw.randrange(len(arguments) + 1)
        if draw.random() < 0.5 or not arguments:
            arguments.insert(place, extra)
        else:
            arguments[min(place, len(arguments) - 1)] = extra
    node["args"] = arguments


def _shape(plan: Plan, draw: random.Random, _: Path) -> None:
    """A layer with other arguments or changes, an example of another size."""
    layers = [
        part for graph in _graphs(plan) for part in graph["modules"] if isinstance(part, dict) and "class" in part
    ]
    if not layers or draw.random() < 0.2:
        size = json.dumps(draw.choice(NUMBERS))
        text = json.dumps(plan.get("example"))
        plan["example"] = json.loads(re.sub(r"(?<=[\[ ])\d+(?=[,\]])", size, text, count=3))
        return
    entry = draw.choice(layers)
    layer = draw.choice(sorted(layer_classes()))
    key = draw.choice(
        ("padding", "stride", "groups", "dilation", "num_layers", "eps", "output_size", "bias", "inplace")
    )
    entry[draw.choice(("config", "set", "shapes"))] = {key: draw.choice((draw.choice(NUMBERS), [2, 2], True, "same"))}
    if draw.random() < 0.3:
        entry["class"] = layer


def _words(plan: Plan, draw: random.Random, folder: Path) -> None:
    """Hostile names wherever names go."""
    text = draw.choice(_strings(folder))
    what = draw.randrange(5)
    node = draw.choice(_nodes(plan) or [{}])
    if what == 0 and isinstance(plan.get("names"), list):
        plan["names"] = [text, *plan["names"][1:]]
    elif what == 1:
        old = str(node.get("name"))
        for graph in _graphs(plan):
            graph["nodes"] = json.loads(json.dumps(graph["nodes"]).replace(json.dumps(old), json.dumps(text)))
    elif what == 2:
        node["target"] = text
    elif what == 3:
        node["kwargs"] = {text: draw.choice(NUMBERS)}
    else:
        node["args"] = [*(node.get("args") or ()), {"dict": [[text, text]]}]


def _graphs(plan: Plan) -> list[Any]:
    found = [plan.get("trunk"), *(plan["heads"] if isinstance(plan.get("heads"), list) else ())]
    good = [graph for graph in found if isinstance(graph, dict)]
    return [g for g in good if isinstance(g.get("nodes"), list) and isinstance(g.get("modules"), list)]


def _nodes(plan: Plan) -> list[Plan]:
    return [node for graph in _graphs(plan) for node in graph["nodes"] if isinstance(node, dict)]


# ---- what hostile files hold

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 5, 7, 64, 1000, 10**6, 10**9, 10**12, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 2**63,
    10**30, 0.0, -1.5, 1e-30, 1e30, 1e308, True, None,
)  # fmt: skip


@cache
def _functions() -> list[str]:
    """What a plan may call, and operators of ATen."""
    names = [f"torch.ops.aten.{name}" for name in sorted(targets._aten()) if hasattr(torch.ops.aten, name)]
    found = [f"{name}.{over}" for name in names for over in getattr(torch.ops.aten, name.rsplit(".", 1)[1]).overloads()]
    return [*sorted(targets.functions()), *found]


@cache
def _values() -> list[Any]:
    """Values of all kinds that a plan writes, and some that it does not."""
    maker: list[Callable[[], Any]] = [list, dict]
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    return [
        *(make() for make in maker), deep, [1, 2], [0], [10**6, 10**6], [-1], {"tuple": [1, 2]},
        {"slice": [0, None, 2]},
        {"dtype": "int64"}, {"dtype": "float16"}, {"dtype": "complex64"}, {"dtype": "qint8"}, {"device": "cuda:7"},
        {"device": "meta"}, {"memory_format": "channels_last"}, {"layout": "strided"}, {"ellipsis": True},
        {"float": "nan"}, {"float": "inf"}, {"node": "x"}, {"node": "conv1"}, {"dict": [["a", 1]]}, "same",
        "trunc", "mean",
    ]  # fmt: skip


def _strings(folder: Path) -> list[str]:
    """Texts that are code where they are not quoted."""
    code = f"__import__('pathlib').Path({str(folder / 'canary')!r}).touch()"
    return [
        code, f"x = {code}", f'"); {code}; ("', f"'); {code}; ('", f'")]\n    {code}\n#', f"a\n{code}\n", f"{{{code}}}",
        f'a"""\n{code}\n"""', f"\\'); {code} #", "os.system", "builtins.eval", "__class__", "__reduce__", "forward",
        "self", "torch", "lambda", "", "a.b", "%1000000000d", "x" * 300, "\uff41", "\u2028", "trunk", "task0",
        "weight", "node", "-",
    ]  # fmt: skip
