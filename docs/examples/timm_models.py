# %% [markdown]
# # Merge two timm models
#
# You have two checkpoints of one architecture, each fine-tuned for its own task, and want one network that does
# both. In this guide the architecture is timm's small test network and the tasks are the digits 0-4 and 5-9, so that
# it runs in seconds; with `resnet50` and your own files nothing else changes.

# %%
import tempfile
from pathlib import Path

import timm
from digits import HALVES, accuracy, fit, loader
from safetensors.torch import save_file
from torch import nn

import fxzip

folder = Path(tempfile.mkdtemp())


def network(classes: int) -> nn.Module:
    return timm.create_model("test_resnet", in_chans=1, num_classes=classes)


for name, classes in HALVES.items():
    save_file(fit(network, classes, epochs=6).state_dict(), folder / f"{name}.safetensors")

# %% [markdown]
# ## Load
#
# `fxzip.zoo.load` builds the architecture and reads the checkpoint: `.safetensors`, or `.pth` without running any
# code in it. How many classes there are it finds out from the file. Names start with `timm:` or `torchvision:`.

# %%
low, high = (fxzip.zoo.load("timm:test_resnet", folder / f"{name}.safetensors", in_chans=1) for name in HALVES)

# %% [markdown]
# ## Merge
#
# The loader gives images of both tasks, prepared as the networks know them. Labels may come with them and are not
# looked at. Some hundreds of images are enough.

# %%
zipped = fxzip.zip(low, high, loader(), names=tuple(HALVES))
print(zipped.report)

# %% [markdown]
# ## Use
#
# One pass through the trunk gives both answers; with `task` only one head is run.

# %%
images = next(iter(loader()))[0]
logits_low, logits_high = zipped(images)
logits_high = zipped(images, task="high")
kept = accuracy(zipped, HALVES)
print(kept)

# %% [markdown]
# ## Save
#
# A saved network needs neither timm nor your own code to be loaded again.

# %%
zipped.save(folder / "merged")
again = fxzip.load(folder / "merged")

# %% [markdown]
# The same on the command line, for a folder of images:
#
# ```console
# fxzip zip --model timm:resnet50 low.safetensors high.safetensors --data IMAGES/ --out merged/
# ```
