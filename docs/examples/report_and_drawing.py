# %% [markdown]
# # The report and the drawing
#
# Every merge has a report. Printed it is a table; in a notebook it shows itself; and it can be written as a page
# that needs no other file, to send to a colleague.

# %%
from digits import HALVES, digit_net, fit, loader

import fxzip

models = [fit(digit_net, classes) for classes in HALVES.values()]
zipped = fxzip.zip(*models, loader(), cut="layer3", names=tuple(HALVES))

print(zipped.report)
page = zipped.report.to_html("merged.html")

# %% [markdown]
# [The page of this merge](../pictures/merged.html). A box is a module, in the colour of the channel space that its
# result lies in. Below, how well the matched channels of both networks correlate, by depth, and where the operations
# are. It needs matplotlib: `pip install 'fxzip[report]'`.
#
# ![Matched correlation by depth](../pictures/correlation.svg){ width="100%" }
#
# ## The drawing

# %%
picture = zipped.draw("merged.svg")

# %% [markdown]
# ![The merged network](../pictures/merged.svg)
#
# Graphviz draws it, as `.svg`, `.png` or `.pdf`; where it is not installed, fxzip draws the `.svg` itself. For a name
# in `.mmd` Mermaid text is written, which GitHub and most editors show as a picture.

# %%
text = zipped.draw("merged.mmd").read_text()

# %% [markdown]
# ## The numbers
#
# What the tables show are plain values:

# %%
for space in zipped.report.spaces:
    print(f"{space.name}: {space.size} channels, correlation {space.correlation:.2f}")
for row in zipped.report.layers[:4]:
    print(f"{row.part or 'trunk'} {row.name}: {row.flops} operations, {row.params} parameters")
