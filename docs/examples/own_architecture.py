# %% [markdown]
# # Your own architecture, and a rule for an operation
#
# fxzip knows no list of architectures. It runs the traced network once on labels instead of numbers, and sees which
# channels belong together: what is added, normalised, gated or convolved. So a network of your own is merged like any
# other.

# %%
import warnings

import torch
from digits import HALVES, accuracy, fit, loader
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip


class Gated(nn.Module):
    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.value = nn.Conv2d(width, width, 3, padding=1)
        self.gate = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.value(x)) * torch.sigmoid(self.gate(F.avg_pool2d(x, 3, 1, 1)))
        return self.fc(F.max_pool2d(x, 4).flatten(1))


# %% [markdown]
# ## Look before you merge
#
# `fxzip.analyse` gives the channel spaces. The stem, the value and the gate share one, since they meet in a sum and a
# product. A copy with the channels of all spaces in another order computes the same: that is what a merge rests on.

# %%
images = next(iter(loader()))[0]
model = fit(Gated, HALVES["low"]).double()
spec = fxzip.analyse(model, images[:2].double())
print(spec)

difference = fxzip.testing.permutation_error(model, images, spec)

# %% [markdown]
# ## Merge
#
# As ever.

# %%
models = [fit(Gated, classes).float() for classes in HALVES.values()]
zipped = fxzip.zip(*models, loader(), names=tuple(HALVES))
kept = accuracy(zipped, HALVES)
print(kept)

# %% [markdown]
# ## An operation that fxzip does not know
#
# Suppose that you have a kernel of your own, a ReLU with a scale for each channel, for 32-bit numbers only.


# %%
@torch.library.custom_op("mine::scaled_relu", mutates_args=())
def scaled_relu(x: Tensor, scale: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("scaled_relu takes float32")
    return x.relu() * scale.view(1, -1, 1, 1)


@scaled_relu.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


class Scaled(nn.Module):
    def __init__(self, classes: int = 5, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(width))
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = scaled_relu(self.stem(x), self.scale)
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


# %% [markdown]
# fxzip tries an operation without a rule on random 64-bit numbers, with the channels in another order. This one
# cannot be tried so. Then its channels are kept in place, with a warning that names it: never a wrong answer, but
# nothing is merged there.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", fxzip.FrozenSpaceWarning)
    before = fxzip.analyse(Scaled(), images[:2])
print(before)

# %% [markdown]
# ## A rule
#
# A rule gets the operation's own arguments, tensors as labels, and says what becomes of the channels. Here: element
# by element, with one value of `scale` for each channel on axis 1.


# %%
@fxzip.register_rule(torch.ops.mine.scaled_relu.default)
def scaled_relu_rule(ctx, x, scale):
    return ctx.elementwise(x, ctx.per_channel(scale, axis=1, like=x))


after = fxzip.analyse(Scaled(), images[:2])
print(after)

# %% [markdown]
# ## A layer of your own
#
# A layer with a weight takes one word more: how its input and its weight are multiplied, as `torch.einsum` has it.
# Then it is a layer like PyTorch's for the whole of fxzip: the heads take their channels back by its weight, and refit
# solves for it.


# %%
@torch.library.custom_op("mine::dense", mutates_args=())
def dense(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bi,io->bo", x, weight)


@dense.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@fxzip.register_rule(torch.ops.mine.dense.default, kind="layer", linear=fxzip.rules.product("x", "weight", "i,io->o"))
def dense_rule(ctx, x, weight):
    return fxzip.rules.contractions.matmul(ctx, x, weight)


class Dense(nn.Module):
    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.weight = nn.Parameter(torch.randn(width, classes) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return dense(F.relu(self.stem(F.avg_pool2d(x, 2).flatten(1))), self.weight)


own = fxzip.zip(*(Dense(5) for _ in HALVES), loader(), names=tuple(HALVES), progress=False)
print("layers solved by refit:", own.report.refitted)

# %% [markdown]
# Rules that move data, reduce over axes or contract channels with weights are as short: see the
# [API](../api/rules.md) of `fxzip.rules`. Test yours as above: a permuted copy must compute the same.
# [`fxzip.testing`](../api/testing.md) has that and more. It computes in 64 bits, where an error is not taken for
# rounding; for this kernel it must be 32.

# %%
small = Scaled()
torch.nn.init.uniform_(small.scale, 0.5, 1.5)  # scales that are all one would be the same in any order
error = fxzip.testing.permutation_error(small, images, after, dtype=torch.float32)
missed = fxzip.testing.mutations_missed(small, images, after, tolerance=1e-4, dtype=torch.float32)
