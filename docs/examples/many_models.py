# %% [markdown]
# # Merge more than two models
#
# Any number of networks can be merged at once: give them all, then the loader. Here three networks know three
# digits each.

# %%
from digits import accuracy, digit_net, fit, loader

import fxzip

TASKS = {"first": range(3), "second": range(3, 6), "third": range(6, 9)}
models = [fit(digit_net, classes) for classes in TASKS.values()]

zipped = fxzip.zip(*models, loader(), cut="layer3", names=tuple(TASKS))
first, second, third = zipped(next(iter(loader()))[0])

# %% [markdown]
# A full merge of three networks costs about a third of them; channels of three networks must then share one. With
# more networks an earlier cut pays sooner.

# %%
full = fxzip.zip(*models, loader(), names=tuple(TASKS))
for merged in (zipped, full):
    kept = accuracy(merged, TASKS)
    cost = merged.report.flops_after / merged.report.flops_before
    print(f"cut at {merged.report.cut}: {cost:.2f} of all three, {sum(kept.values()) / len(kept):.1f} % right")

# %% [markdown]
# Some methods take two networks only (`optimal` is one); they say so.
