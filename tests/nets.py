"""Small networks that the tests merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import fxzip
from tests.oracles import randomise


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, body: Callable[[Net, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def chain(m: Net, x: Tensor) -> Tensor:
    """All layers in turn, the pixels averaged before the head."""
    for name, layer in m.named_children():
        x = layer(x.mean((2, 3))) if name == "head" else layer(x)
    return x


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = conv(width, 4, 1), conv(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """A residual block with a gate, and a shortcut where the width changes."""

    def __init__(self, i: int, o: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(i, o), norm(o)
        self.conv2, self.norm2 = conv(o, o), norm(o)
        self.gate = Gate(o)
        self.shortcut = conv(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.gate(self.norm2(self.conv2(y))) + self.shortcut(x))


class Residual(nn.Module):
    """A residual network of two stages with gates."""

    def __init__(self, classes: int = 5, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, width), norm(width)
        self.layer1 = Block(width, width, norm)
        self.layer2 = Block(width, width + 4, norm)
        self.fc = nn.Linear(width + 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.layer2(F.max_pool2d(self.layer1(x), 2))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def pair(make: Callable[[], nn.Module], x: Any, count: int = 2) -> list[nn.Module]:
    """Networks with different random weights, float64."""
    return [randomise(make(), x, seed) for seed in range(count)]


def permuted_copy(model: nn.Module, x: Any) -> nn.Module:
    """The same function with all channels elsewhere."""
    return fxzip.analyse(model, x).permute(model, Generator().manual_seed(2))


def places(prepared: fxzip.Prepared) -> dict[str, int]:
    """The place of every valid cut, by module and by node."""
    cuts = prepared.places.cuts
    return {name: at for name, at in cuts.named.items() if at in cuts.valid and at <= cuts.default}


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """The models' state dicts, modes, hooks and attributes are as they were, whatever happens."""
    before = [snapshot(model) for model in models]
    yield
    for (tensors, rest), model in zip(before, models, strict=True):
        now, now_rest = snapshot(model)
        assert rest == now_rest
        assert tensors.keys() == now.keys()
        for key, tensor in tensors.items():
            assert tensor.is_meta or torch.equal(tensor.nan_to_num(7), now[key].nan_to_num(7)), key


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[Any]]:
    """Copies of all tensors; and modes, hooks, the identity of parameters and the names of attributes."""
    rest: list[Any] = [torch.is_grad_enabled()]
    for name, module in model.named_modules():
        hooks = [list(getattr(module, kind).items()) for kind in _HOOKS]
        rest.append((name, type(module), module.training, hooks, sorted(module.__dict__)))
    rest += [
        (name, id(p), p.requires_grad, p.dtype, p.device, p.stride(), p.grad) for name, p in model.named_parameters()
    ]
    return {key: value.detach().clone() for key, value in model.state_dict().items()}, rest
