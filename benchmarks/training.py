"""Training of the benchmarks' networks, with checkpoints so that a run can be taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Split


def augment(images: Tensor, pad: int) -> Tensor:
    """Random shifts by up to ``pad`` pixels and flips, one for each image."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4)
    rows = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(width)
    flip = torch.rand(n, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    make: Callable[[], nn.Module],
    split: Split,
    *,
    seed: int,
    epochs: int,
    batch: int = 128,
    lr: float = 0.4,
    checkpoint: Path | None = None,
    bf16: bool = False,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Train with SGD, Nesterov momentum and a one-cycle schedule; or read the checkpoint, if there is one."""
    torch.manual_seed(seed)
    model = make()
    if checkpoint is not None and checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = math.ceil(len(split.images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)
    pad = split.images.shape[-1] // 8
    for epoch in range(epochs):
        total = 0.0
        for here in torch.randperm(len(split.images)).split(batch):
            x = augment(split.images[here], pad).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x).float(), split.labels[here])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss) * len(here)
        log(f"seed {seed} epoch {epoch + 1}/{epochs}: loss {total / len(split.images):.4f}")
    model = model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), checkpoint)
    return model
