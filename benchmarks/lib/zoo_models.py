"""The models of the zoo, by name: ``timm:NAME``, ``torchvision:NAME``, ``backbone:NAME`` of torchvision's detectors."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from benchmarks.lib.runs import RESULTS, write

FAMILIES = RESULTS / "zoo_families.json"
BACKBONES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
SIZES = (64, 96, 128, 160, 192, 224)
"""Sides of the images that are tried, smallest first; then the model's own."""


def zoo() -> list[str]:
    """The zoo: timm's smallest model of each family, and torchvision's models for classes, pixels, videos and boxes."""
    return [f"timm:{name}" for name in families().values()] + torchvision_models()


def torchvision_models() -> list[str]:
    """All classifiers, segmentation and video models of torchvision, and the backbones of its detectors."""
    from torchvision import models

    kinds = (models, models.segmentation, models.video)
    found = [f"torchvision:{name}" for kind in kinds for name in models.list_models(module=kind)]
    return found + [f"backbone:{name}" for name in BACKBONES]


def families() -> dict[str, str]:
    """The model of timm with the fewest parameters in each family (module); found once for each version of timm."""
    import timm

    if FAMILIES.exists():
        known = json.loads(FAMILIES.read_text())
        if known["timm"] == timm.__version__:
            return dict(known["families"])
    sizes: dict[str, list[tuple[int, str]]] = {}
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                model = timm.create_model(name)
            sizes.setdefault(family, []).append((sum(p.numel() for p in model.parameters()), name))
    found = {family: min(counted)[1] for family, counted in sizes.items()}
    write(FAMILIES, {"timm": timm.__version__, "families": found})
    return found


def make(name: str, fake: bool = False) -> nn.Module:
    """A model with random weights.

    Args:
        name: As `zoo` gives them.
        fake: Parameters without values, which take no memory while the model is made; buffers have theirs.
    """
    torch.manual_seed(0)
    library, _, model = name.partition(":")
    build = {"timm": _timm, "torchvision": _torchvision, "backbone": _backbone}[library]
    if not fake:
        return build(model)
    handle = register_module_parameter_registration_hook(_without_values)
    try:
        return build(model)
    except (NotImplementedError, RuntimeError):  # it computes with its parameters while it is made
        handle.remove()
        found = build(model)
        for module in found.modules():
            for key, parameter in module.named_parameters(recurse=False):
                module._parameters[key] = _without_values(module, key, parameter)
        return found
    finally:
        handle.remove()


def _without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def _timm(name: str) -> nn.Module:
    import timm

    found = timm.create_model(name)
    if getattr(found, "num_classes", 1) == 0:  # features only, all of which stay in place
        return timm.create_model(name, num_classes=10)
    return found


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    extra: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in models.list_models(module=models.segmentation):
        extra = {"weights_backbone": None}
    found: Any = models.get_model(name, weights=None, **extra)
    if name.startswith(("vgg", "alexnet")):  # as it is, but narrow: 4096 wide it takes 0.8 GB a copy in float64
        width = next(m.in_features for m in found.classifier if isinstance(m, nn.Linear))
        narrow = (nn.Linear(width, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        found.classifier = nn.Sequential(*narrow)
    return found


def _backbone(name: str) -> nn.Module:
    from torchvision import models

    detector: Any = models.get_model(name, weights=None, weights_backbone=None)
    found: nn.Module = detector.backbone
    return found


def all_of_timm() -> list[str]:
    """Every model of timm."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def shorten(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Leave out repeated blocks: of blocks in a row that have equal shapes two are kept; how many went.

    The first of them stays in its place, and so does the last: what else differs (strides, drop paths, the norm
    behind the last one) is at the ends. Blocks without which the model does not run (branches side by side) stay.
    """
    left_out = 0
    for owner in list(model.modules()):
        if isinstance(owner, (nn.Sequential, nn.ModuleList)):
            before, kept = owner._modules, _ends(owner)
            owner._modules = {str(k) if name.isdigit() else name: block for k, (name, block) in enumerate(kept)}
            if len(kept) < len(before) and not _takes(model, shape):
                owner._modules = before
            left_out += len(before) - len(owner._modules)
    return left_out


def _ends(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a list, of equal ones in a row the first and the last."""
    kept: list[tuple[str, nn.Module]] = []
    for name, block in owner.named_children():
        if len(kept) > 1 and _shapes(block) and all(_shapes(block) == _shapes(other) for _, other in kept[-2:]):
            kept.pop()
        kept.append((name, block))
    return kept


def _shapes(block: nn.Module) -> tuple[Any, ...]:
    parts = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
    return (type(block), *parts) if parts else ()


def own_shape(name: str) -> tuple[int, ...]:
    """The shape of one input that a model of timm was made for."""
    model = make(name, fake=True)
    return tuple(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))


def input_shape(name: str) -> tuple[int, ...]:
    """The shape of one input: of the smallest images that the model takes, or of a short video.

    Raises:
        RuntimeError: It takes none of the shapes that were tried.
    """
    library, _, short = name.partition(":")
    if library == "backbone":
        return (3, 300, 300) if short == "ssd300_vgg16" else (3, 64, 64)
    if library == "torchvision":
        return _torchvision_shape(short)
    model = make(name)
    settings = getattr(model, "default_cfg", {})
    channels, *own = settings.get("input_size", (3, 224, 224))
    if settings.get("fixed_input_size"):
        return (channels, *own)
    least = max(settings.get("min_input_size", (0, 0, 0))[1:])
    for side in (*(s for s in SIZES if s >= least), max(own)):
        if _takes(model, (channels, side, side)):
            return (channels, side, side)
    raise RuntimeError(f"{name} takes no images of the sides {SIZES} or {own}")


def _torchvision_shape(name: str) -> tuple[int, ...]:
    from torchvision import models

    if name in models.list_models(module=models.video):
        return (3, 16, 224, 224) if name.startswith(("mvit", "s3d")) else (3, 4, 64, 64)
    if name.startswith(("vit_", "maxvit")):
        return (3, 224, 224)
    return (3, 96, 96) if name.startswith("inception") else (3, 64, 64)


def _takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on two images of a shape."""
    try:
        with torch.no_grad():
            output = model.eval()(torch.rand(2, *shape))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
        return False
    return not isinstance(output, Tensor) or bool(output.isfinite().all())
