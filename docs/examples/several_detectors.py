# %% [markdown]
# # Several detectors in one
#
# A detector is more than a network: it takes lists of images, makes proposals, sorts out boxes. What costs is its
# backbone. So detectors are merged by that part: the whole models run on your batches up to it, it is merged, and you
# get whole models back, whose outputs look as before.
#
# Here are two detectors of torchvision for different classes, with random weights and small images, so that this page
# runs in seconds; with yours nothing else changes.

# %%
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import fxzip

sizes = {"weights": None, "weights_backbone": None, "min_size": 96, "max_size": 96}
torch.manual_seed(0)
cars, signs = (fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=count, **sizes).eval() for count in (4, 7))

# %% [markdown]
# Batches are what the detectors take: lists of images, with or without targets, which are not used.

# %%
batches = [[torch.rand(3, 96, 96) for _ in range(4)] for _ in range(4)]
merged = fxzip.zip(cars, signs, batches, part="backbone", names=("cars", "signs"), effort="fast")
found = merged.models["signs"](batches[0])
print(sorted(found[0]), f"{merged.zipped.report.flops_after / merged.zipped.report.flops_before:.2f} of both backbones")

# %% [markdown]
# The models share the merged part: on the images of one stream it needs to run once, for all of them.

# %%
shared = merged.models["cars"].backbone.zipped is merged.models["signs"].backbone.zipped
images = torch.stack(batches[0])
features = merged.zipped(images)  # one dict of maps for each task, from one pass through the trunk
print(shared, [tuple(features[0][level].shape) for level in features[0]])

# %% [markdown]
# ## Save and load
#
# The merged part is saved without pickle; what is around it is your own code, so it needs your models.

# %%
merged.zipped.save("backbone")
again = fxzip.put_part(fxzip.load("backbone"), {"cars": cars, "signs": signs}, "backbone")
with torch.no_grad():
    same = torch.equal(again.models["cars"](batches[0])[0]["scores"], merged.models["cars"](batches[0])[0]["scores"])

# %% [markdown]
# Segmenters, two-tower models and encoders under task heads are merged in the same way: `part` is any module, as
# `model.get_submodule` names it, that gets the same inputs in all models.
