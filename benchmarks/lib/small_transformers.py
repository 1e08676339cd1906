"""Small transformers on disjoint tasks: the networks, their texts and images, and how they are trained."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.data import read_mnist
from benchmarks.lib.machine import Stopwatch
from benchmarks.lib.runs import CHECKPOINTS

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
LENGTH = 48


@dataclass(frozen=True)
class Task:
    """Inputs and labels of one task; labels are (n,) or, one for each position, (n, length)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A pair of tasks and how networks are trained on them.

    Attributes:
        make: A network from the current seed.
        tasks: The two tasks.
        steps: Batches of training.
        batch: Inputs in a batch.
        cuts: Where the merges are cut; None for full.
        calibration: Inputs of each task that the merges see.
    """

    make: Callable[[], nn.Module]
    tasks: tuple[Task, Task]
    steps: int
    batch: int
    cuts: tuple[str | None, ...]
    calibration: int


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm and beside the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model of characters (Radford et al., 2019) whose embedding is its read-out too."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.wte = nn.Embedding(len(CHARACTERS), width)
        self.wpe = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.normal_(self.wpe.weight, std=0.1)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_vit() -> nn.Module:
    """A vision transformer of some 200,000 parameters for 16 patches and a class token."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=5, class_token=True
    )


def vit(data: Path) -> Setting:
    """MNIST in two halves of five classes."""
    parts = [
        ((torch.from_numpy(images)[:, None].float() / 255 - 0.1307) / 0.3081, torch.from_numpy(labels).long())
        for images, labels in read_mnist(data)
    ]

    def half(name: str, first: int) -> Task:
        chosen = [(x[mine], y[mine] - first) for x, y in parts for mine in [(y // 5) == first // 5]]
        return Task(name, chosen[0], chosen[1])

    tasks = half("0-4", 0), half("5-9", 5)
    return Setting(make_vit, tasks, steps=700, batch=128, cuts=(None, "blocks.3", "blocks.2"), calibration=500)


def gpt(data: Path) -> Setting:
    """Two texts that come with Python."""
    tasks = _language("prose", prose()), _language("code", code())
    return Setting(GPT, tasks, steps=1500, batch=48, cuts=(None, "blocks.2", "blocks.1"), calibration=500)


def gpt_other(data: Path) -> Setting:
    """Two other texts that come with Python, on which nothing was tuned."""
    tasks = _language("docstrings", docstrings()), _language("packages", packages())
    return Setting(GPT, tasks, steps=1500, batch=48, cuts=(None, "blocks.2", "blocks.1"), calibration=500)


def prose() -> str:
    """The topics of Python's help: English about Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def code() -> str:
    """Modules of the standard library without comments and docstrings."""
    return "\n".join(_parted(path)[0] for path in sorted(_library().glob("*.py"))[:80])


def docstrings() -> str:
    """What modules, classes and functions of the standard library say of themselves."""
    found = (_parted(path)[1] for path in sorted(_library().glob("*.py")))
    return "\n".join("\n".join(texts) for texts in found)


def packages() -> str:
    """Packages of the standard library without comments and docstrings: no module of `code` is among them."""
    names = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
    return "\n".join(_parted(path)[0] for name in names for path in sorted((_library() / name).rglob("*.py")))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _parted(path: Path) -> tuple[str, list[str]]:
    """A module's code without comments and docstrings, and the docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                texts.append(inspect.cleandoc(first.value))
                body[0] = ast.Pass()
    return ast.unparse(tree), texts


def _language(name: str, text: str) -> Task:
    """Next-character prediction; the last tenth of the text is the test."""
    place = {character: i for i, character in enumerate(CHARACTERS)}
    tokens = torch.tensor([place[c] for c in text if c in place])
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    end = len(rows) * 9 // 10
    shifted = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in (rows[:end], rows[end:][:500])]
    return Task(name, shifted[0], shifted[1])


def networks(
    make: Callable[[Path], Setting], seed: int, checkpoints: str, data: Path
) -> tuple[Setting, list[nn.Module]]:
    """The tasks of a pair, and a network for each, trained from the seed and from the next or read."""
    setting = make(data)
    pairs = enumerate(setting.tasks)
    return setting, [
        trained(setting, task, seed + n, CHECKPOINTS / f"transformers_{checkpoints}_{seed + n}.pt") for n, task in pairs
    ]


def trained(setting: Setting, task: Task, seed: int, checkpoint: Path) -> nn.Module:
    """A network trained by AdamW with a one-cycle schedule; read from its checkpoint if there is one."""
    torch.manual_seed(seed)
    model = setting.make()
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=setting.steps, pct_start=0.1)
    inputs, labels = task.train
    watch = Stopwatch()
    for step in range(setting.steps):
        here = torch.randint(len(inputs), (setting.batch,))
        loss = F.cross_entropy(model(inputs[here]).flatten(0, -2), labels[here].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{task.name}: step {step + 1}, loss {loss.item():.3f}, {watch()[0]:.0f} s", flush=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), checkpoint)
    return model.eval()
