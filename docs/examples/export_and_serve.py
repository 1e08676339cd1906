# %% [markdown]
# # Export and serve
#
# A merged network is of use where nobody has PyTorch, timm or your classes. There are three ways out: a folder of
# fxzip's own, an ONNX file, and a program of `torch.export`.

# %%
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from digits import HALVES, digit_net, fit, loader

import fxzip

models = [fit(digit_net, classes) for classes in HALVES.values()]
zipped = fxzip.zip(*models, loader(), names=tuple(HALVES))
images = next(iter(loader()))[0]
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder
#
# Weights as safetensors, the graph as JSON, and a model card. Nothing in it is pickle, and nothing that is read can
# run code. The same numbers come out, bit by bit.

# %%
zipped.save(folder / "merged")
again = fxzip.load(folder / "merged")
same = all(torch.equal(a, b) for a, b in zip(zipped(images), again(images), strict=True))

# %% [markdown]
# ## ONNX
#
# The file has one output for each task, named as the tasks, and any batch size. It is run in onnxruntime on the spot
# and compared with the network; if it computed anything else, there would be an error and no file.

# %%
print(zipped.export(folder / "merged.onnx"))

session = onnxruntime.InferenceSession(folder / "merged.onnx")
low, high = session.run(["low", "high"], {"x": images[:7].numpy()})
difference = float(np.abs(low - zipped(images[:7], task="low").detach().numpy()).max())

# %% [markdown]
# Where a server answers for one task only, export its head alone: it has the trunk, too.

# %%
zipped.export(folder / "low.onnx", task="low")

# %% [markdown]
# ## torch.export
#
# The program runs without fxzip.

# %%
zipped.export(folder / "merged.pt2")
program = torch.export.load(folder / "merged.pt2").module()
outputs = program(images[:3])

# %% [markdown]
# On the command line:
#
# ```console
# fxzip export merged/ merged.onnx
# ```
