# %% [markdown]
# # Pick the cut
#
# The trunk is shared up to the *cut*, and each task has its own head behind it. A late cut saves more, an early one
# keeps more. Early layers of networks for related tasks look alike; late ones are often worth keeping apart.

# %%
from digits import HALVES, digit_net, digits, fit, joint, loader

import fxzip

models = [fit(digit_net, classes) for classes in HALVES.values()]
prepared = fxzip.prepare(*models, example_inputs=digits().test.tensors[0][:2], names=tuple(HALVES))

# %% [markdown]
# ## Where it can be cut
#
# A cut has the name of the module that the heads begin at.

# %%
print(prepared.cuts)

# %% [markdown]
# ## Try many
#
# Observing is one pass over the data, and is done once. Every merge after that starts from what was observed, so a
# sweep over cuts and methods is cheap. It needs no labels: *agreement* is how often a merge answers as the networks do,
# on images that were held back, *explained* the share of their outputs' variation that it tells, both in percent.

# %%
prepared.observe(loader())
sweep = prepared.sweep(
    cuts=["layer2", None],
    methods=["zip", {"method": "zip", "refit": False, "name": "zip, paper's rule"}],
)
print(sweep)

# %% [markdown]
# ## Choose
#
# ![Scores over operations](../pictures/sweep.svg){ width="100%" }
#
# The best row within a budget, in multiples of one network's FLOPs:

# %%
best = sweep.best(flops=1.5)
zipped = prepared.convert(cut=best.cut, method="zip")
print(zipped.report.fidelity)
print(f"among all ten digits: {joint(zipped):.1f} %")

# %% [markdown]
# Who has labels gives `sweep` an `evaluate`, a function from the merged network to a number or to several by name.

# %% [markdown]
# Without a sweep a cut can be a name, a share of the layers for the trunk, or a budget:

# %%
for cut in ("layer3", 0.5, "flops<=1.5x"):
    merged = prepared.convert(cut=cut, method="zip", refit=False)
    ratio = merged.report.flops_after / merged.report.before[0].flops
    print(f"{cut}: {ratio:.2f} networks")

# %% [markdown]
# ## Start later
#
# What a late cut loses it mostly loses in the first layers, where one network's width computes what two did. With
# `start` each network keeps its own layers up to there, side by side, and what follows is merged. For an early cut's
# operations it can keep more than that: compare both on your models.

# %%
merged = prepared.convert(start="layer2", method="zip", progress=False)
ratio = merged.report.flops_after / merged.report.before[0].flops
print(f"{merged.report.where}: {ratio:.2f} networks, joint accuracy {joint(merged):.1f}")

# %% [markdown]
# The report's page shows the sweep as a chart:

# %%
zipped.report.to_html("cut.html", sweep=sweep)
