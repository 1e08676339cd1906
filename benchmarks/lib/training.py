"""Training of the benchmarks' networks, with checkpoints so that a run can be taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.data import Split

Vary = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def augment(images: Tensor, flip: bool = True, border: str = "constant") -> Tensor:
    """Random shifts by up to an eighth of the side, and flips, one for each image.

    Args:
        images: (n, channels, side, side).
        flip: Whether to mirror half of them; not for what is read, letters and digits.
        border: What comes in from outside, as of `torch.nn.functional.pad`.
    """
    n, _, height, width = images.shape
    pad = width // 8
    padded = F.pad(images, (pad,) * 4, mode=border)
    rows = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (n, 1)) + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def classification(output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits."""
    return F.cross_entropy(output, labels)


def reconstruction(output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error against the network's own input."""
    return F.mse_loss(output, images)


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
    vary: Vary = augment,
    loss_of: Loss = classification,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Train with SGD, Nesterov momentum and a one-cycle schedule; or read the checkpoint, if there is one.

    Args:
        make: A network from the current seed.
        split: What to train on.
        seed: Of the weights, the order and the augmentation.
        epochs: Passes over the images.
        batch: Images in a batch.
        lr: The highest learning rate.
        checkpoint: Where the weights are kept.
        bf16: Run the network under bfloat16 autocast.
        vary: What is done to a batch of images first.
        loss_of: The loss, of outputs, images and labels.
        log: Takes a line of progress, some ten times.
    """
    torch.manual_seed(seed)
    model = make()
    if checkpoint is not None and checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = math.ceil(len(split.images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)
    for epoch in range(epochs):
        total = 0.0
        for here in torch.randperm(len(split.images)).split(batch):
            x = vary(split.images[here]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model(x).float(), x, split.labels[here])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(here)
        if (epoch + 1) % math.ceil(epochs / 10) == 0:
            log(f"seed {seed} epoch {epoch + 1}/{epochs}: loss {total / len(split.images):.4f}")
    model = model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), checkpoint)
    return model
