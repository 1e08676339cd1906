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
# ## Eight bits
#
# An exported file can be quantised, by onnxruntime for instance: weights alone (dynamic), or activations too, whose
# ranges are taken from some images (static). Both keep what the network answers here, in less than a third of the size.

# %%
import logging

from digits import digits
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

logging.getLogger().setLevel(logging.ERROR)  # it asks for a step that this network does not need


class Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter(digits().train.tensors[0][:256].split(32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


quantize_dynamic(folder / "merged.onnx", folder / "dynamic.onnx", weight_type=QuantType.QUInt8)
quantize_static(folder / "merged.onnx", folder / "static.onnx", Calibration(), per_channel=True)

kept = {}
pixels, labels = digits().test.tensors
for name in ("merged", "dynamic", "static"):
    served = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    outputs_of = dict(zip(HALVES, served.run(list(HALVES), {"x": pixels.numpy()}), strict=True))
    kept[name] = {"kB": (folder / f"{name}.onnx").stat().st_size // 1000}
    for task, classes in HALVES.items():
        mine = np.isin(labels, classes)
        right = outputs_of[task][mine].argmax(1) + classes[0] == labels[mine].numpy()
        kept[name][task] = round(100 * float(right.mean()), 1)
    print(name, kept[name])

# %% [markdown]
# On the command line:
#
# ```console
# fxzip export merged/ merged.onnx
# ```
