# %% [markdown]
# # Widths
#
# A merged trunk need not be as wide as one network. More channels lose less, fewer cost less, and one network can be
# made smaller by the same means.

# %%
from digits import HALVES, digit_net, digits, fit, loader

import fxzip

models = [fit(digit_net, classes) for classes in HALVES.values()]
prepared = fxzip.prepare(*models, example_inputs=digits().test.tensors[0][:2], names=tuple(HALVES))
prepared.observe(loader())


def shown(zipped: fxzip.ZippedModel) -> str:
    """What a merge costs, in networks, and what it does not tell of the networks' outputs."""
    report = zipped.report
    flops, fidelity = len(report.before) * report.flops_after / report.flops_before, report.fidelity
    assert fidelity is not None
    return f"{flops:.2f}x FLOPs, {fidelity.unexplained:.2%} unexplained"


# %% [markdown]
# ## A width
#
# A number says how many channels each space gets, as a share of one network's; names of modules or channel spaces take
# one each. The methods `select`, `zip` and `auto` can do so.

# %%
for width in (None, 1.3, {"layer2": 1.3}):
    print(width, "-", shown(prepared.convert(width=width, method="select")))

# %% [markdown]
# ## A budget
#
# A budget in multiples of one network, `"flops<=1.2x"` or `"params<=1.5x"`, is shared out: a space gets more channels
# where they leave less unexplained for what they cost. `"fidelity>=0.98"` takes the narrowest trunk that keeps so much.

# %%
zipped = prepared.convert(budget="flops<=1.2x", method="select")
print(shown(zipped))
print({row.name: f"{row.size} -> {row.merged or row.size}" for row in zipped.report.spaces})

# %% [markdown]
# ## One network, smaller
#
# `fxzip.shrink` takes one network. The channels that stay are those that the others are best told from, and each layer
# is solved for what the network gives.

# %%
small = fxzip.shrink(models[0], loader(), budget="flops<=0.5x", name="low")
print(shown(small))
logits = small(digits().test.tensors[0], task="low")

# %% [markdown]
# ## What cannot change
#
# A layer's weights say how much of each channel goes into a sum, so there can be any number of channels before it. A
# mean or a norm over channels, a LayerNorm for one, depends on how many there are: those channels keep their number,
# and `space.fixed` says why. The channels inside of an attention head keep theirs, too; heads are added and left out as
# wholes. Each merge is verified at the very widths that were asked for.

# %%
print([space.name for space in prepared.spec.spaces if not space.resizable])
