# %% [markdown]
# # After the merge
#
# A merged network is a network: train it further, take some of its heads, let another network join, or go back to
# your own classes with the merged weights in them. Here are two small ResNets for the digits 0-4 and 5-9.

# %%
import torch
from digits import HALVES, accuracy, digit_net, digits, fit, loader
from torch.nn import functional as F

import fxzip

models = [fit(digit_net, classes) for classes in HALVES.values()]
names = {task: [str(digit) for digit in classes] for task, classes in HALVES.items()}
zipped = fxzip.zip(*models, loader(), names=tuple(HALVES), labels=names)

# %% [markdown]
# ## Back into your own classes
#
# Your code is written for your own class: `forward_features`, `generate`, hooks, checkpoints with its keys.
# `as_models` gives for each task a copy of your module with the merged weights. Its trunk is in memory once. What was
# folded into a layer is unfolded again (a BatchNorm has the statistics 0 and 1 then), and each model is checked against
# the merged network.

# %%
own = zipped.as_models()
image = digits().test.tensors[0][:1]
same = torch.allclose(own["low"](image), zipped(image, task="low"), atol=1e-5)
shared = own["low"].conv1.weight is own["high"].conv1.weight
print(type(own["low"]).__name__, same, shared)

zipped.save("checkpoints", layout="models")  # low.safetensors and high.safetensors, with your own keys
models[0].load_state_dict(own["low"].state_dict())

# %% [markdown]
# A layer without a bias, and without a norm behind it, may get a bias by the fit, for which your class has no place;
# that is an error that names the layer. `refit=fxzip.RefitOptions(biases=False)` fits without. What cannot go back:
# weights that your class standardises, after a refit (weight normalisation can); a `start`, and cuts behind which
# channels are gathered. `layout="deltas"` writes the trunk's tensors once, and those of the heads for each task.
#
# ## Train it further
#
# What your networks trained, the merged one does, too: biases that came from BatchNorms as well. Norms are folded, so a
# small learning rate does. With `refit=fxzip.RefitOptions(keep_norms=True)`, or `fxzip zip --keep-norms`, BatchNorms
# stay where they were: the same in eval mode, and in train mode they normalise by the batch and learn, as when your
# networks were trained. It is refit that folds them: with `refit=False` they stay anyway, their statistics reset.

# %%
pixels, labels = digits().train.tensors
optimizer = torch.optim.AdamW(zipped.parameters(), lr=3e-4)
before = accuracy(zipped, HALVES)
torch.manual_seed(0)
for _ in range(100):
    batch = torch.randint(len(pixels), (32,))
    outputs = torch.cat(zipped(pixels[batch]), 1)  # all ten classes at once
    optimizer.zero_grad()
    F.cross_entropy(outputs, labels[batch]).backward()
    optimizer.step()
after = accuracy(zipped, HALVES)
print(before, after)

# %% [markdown]
# ## Some of the tasks
#
# `select` gives a network with some of the heads, which shares its tensors with the first; its report, exports and
# saved folders know of these only.

# %%
low, high = zipped(image, task=["low", "high"])
only = zipped.select(["low"])
print(only.names, f"{only.report.params_after:,} parameters")

# %% [markdown]
# ## Another network joins
#
# Each task of a merged network is a model of the next merge, and keeps its name.

# %%
third = fit(digit_net, range(3, 8))
three = fxzip.zip(zipped, third, loader(), names=("low", "high", "middle"))
kept = accuracy(three, {**HALVES, "middle": range(3, 8)})
print(three.names, kept)

# %% [markdown]
# ## Names of classes
#
# Labels and the preparation of images travel with the network: in its folder, its card and in ONNX files. Models of
# timm and transformers bring them along, `fxzip zip` takes the names of the images' folders. A tensor is prepared
# already; a file or an image of Pillow's is prepared as the models say.

# %%
best = zipped.predict(image[0], top=1)
print({task: (found[0].label, round(found[0].score, 3)) for task, found in best.items()})

# %% [markdown]
# ## The hub
#
# A merged network is pushed to the Hugging Face hub with a card: what it was merged from, licences, how faithful it is.
# Whoever loads it reads two files, as from a folder; nothing that lies there can run code.
#
# ```python
# zipped.push_to_hub("me/digits", licence="mit", base_models=["me/low", "me/high"], datasets=["sklearn/digits"])
# zipped = fxzip.load("me/digits", revision="main")
# ```
#
# On the command line:
#
# ```console
# fxzip predict merged/ image.jpg
# ```
