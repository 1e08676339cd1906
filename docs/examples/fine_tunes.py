# %% [markdown]
# # Fine-tunes of one checkpoint
#
# Most networks are fine-tunes, and many are fine-tunes of the same checkpoint. They share the order of their channels,
# so a plain mean of their weights is one of the candidates: `auto` tries it where it finds that the networks are close.
#
# Here a small ResNet has learnt all ten digits a little, and is fine-tuned on the digits 0-4 and on 5-9.

# %%
import copy

import torch
from torch.nn import functional as F

import fxzip
from fxzip.demo import DigitNet, load_digits

digits = load_digits()
pixels, labels = digits.train.tensors
HALVES = {"low": range(5), "high": range(5, 10)}


def train(network, classes, steps, rate=3e-3):
    mine = torch.isin(labels, torch.tensor(classes))
    images, targets = pixels[mine], labels[mine] - classes[0]
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=rate)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), targets[batch]).backward()
        optimizer.step()
    return network.eval()


torch.manual_seed(0)
base = train(DigitNet(classes=10), range(10), steps=60)
fine_tunes = {}
for task, classes in HALVES.items():
    network = copy.deepcopy(base)
    network.head = torch.nn.Linear(network.head.in_features, len(classes))
    fine_tunes[task] = train(network, classes, steps=60, rate=1e-3)

# %% [markdown]
# ## Merge them
#
# Nothing needs to be said: the report tells what was tried, and what each gave on images that the fit did not see.

# %%
zipped = fxzip.zip(*fine_tunes.values(), pixels.split(128), names=tuple(HALVES))
for tried in zipped.report.tried:
    print(tried)


def accuracy(network, classes):
    images, targets = digits.test.tensors
    mine = torch.isin(targets, torch.tensor(classes))
    with torch.no_grad():
        right = network(images[mine]).argmax(1) == targets[mine] - classes[0]
    return round(100 * right.double().mean().item(), 1)


kept = {}
for task, classes in HALVES.items():
    kept[task] = accuracy(fine_tunes[task], classes), accuracy(lambda x, task=task: zipped(x, task=task), classes)
print(kept)

# %% [markdown]
# ## Shares of one task
#
# Networks that were trained on shares of the data for the same classes (in federated learning, or from several seeds)
# can give one answer: `heads="mean"` is the mean of all outputs, as their ensemble gives, at the cost of one network.

# %%
torch.manual_seed(1)
shares = [train(copy.deepcopy(base), range(10), steps=60, rate=1e-3) for _ in range(3)]
fused = fxzip.zip(*shares, pixels.split(128), heads="mean")
one = accuracy(lambda x: fused(x, task="joint"), range(10))
alone = [accuracy(share, range(10)) for share in shares]
print(one, alone, f"{fused.report.flops_after / fused.report.flops_before:.2f} of all three")

# %% [markdown]
# Where the tasks' classes are to be one list, `heads="concat"` gives one head with all of them.
