"""What the tests of saving and exporting share: networks to serve, and a fresh process that serves them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.report import Cost, Report

ROOT = Path(__file__).parents[2]
BATCHES = (1, 7)


class Small(nn.Module):
    """A user's own class: a residual network with a scale that is no part of the state dict."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.conv2(x) * self.scale + x
        return self.head(self.pool(x).flatten(1))


def zipped_small(*classes: int) -> fxzip.ZippedModel:
    """Small networks of so many classes, merged."""
    x = torch.randn(8, 3, 12, 12)
    return fxzip.zip(*(Small(number) for number in classes or (5, 5)), [x], progress=False)


def hand_made(*modules: nn.Module, x: Tensor | None = None) -> fxzip.ZippedModel:
    """A network with an empty trunk: heads that fxzip did not make."""
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    heads = {f"task{i}": m if isinstance(m, fx.GraphModule) else fx.symbolic_trace(m) for i, m in enumerate(modules)}
    none = Cost(0, 0)
    report = Report(tuple(heads), "none", "x", (), None, (), (), 0.0, (none,), none, (none,))
    example = None if x is None else ((x,), {})
    return fxzip.ZippedModel(fx.GraphModule(nn.Module(), graph), heads, report, example).eval()


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    model = VGG(make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=True), num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(128, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 5))
    return model


def _resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=5)


def _densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5)


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), num_classes=5, ls_init_value=0.5)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (_resnet, 2, 64),
    "vgg": (_vgg, 2, 32),
    "densenet": (_densenet, 2, 64),
    "convnext": (_convnext, 2, 64),
    "vit": (_vit, 2, 32),
    "three": (Small, 3, 16),
}
"""By name: what makes one of them, how many are merged, and the size of the images."""

SERVE = """
import json, sys
for name in ("timm", "torchvision"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
folder, given = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
result = {}
import fxzip, onnxruntime
zipped = fxzip.load(folder + "/saved")
program = torch.export.load(folder + "/m.pt2").module()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(folder + "/m.onnx", options)
names = [value.name for value in session.get_outputs()]
with torch.no_grad():
    for key, x in given.items():
        result["loaded" + key] = list(zipped(x))
        result["program" + key] = list(program(x))
        result["onnx" + key] = [torch.from_numpy(v) for v in session.run(names, {"x": x.numpy()})]
result["names"], result["keys"] = names, list(zipped.state_dict())
torch.save(result, folder + "/result.pt")
"""


def serve(folder: Path, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What ``folder``'s saved network and exported files give in a process without the networks' classes."""
    torch.save(inputs, folder / "inputs.pt")
    run_fresh(SERVE, str(folder), str(folder / "inputs.pt"))
    return torch.load(folder / "result.pt", weights_only=True)


def run_fresh(code: str, *args: str) -> str:
    """Run Python code in a process of its own; returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
