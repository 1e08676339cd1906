"""The passes of fxzip, in the order in which they run.

| pass                | takes                          | gives                                | changes         |
| ------------------- | ------------------------------ | ------------------------------------ | --------------- |
| `trace`             | a model, example inputs        | a GraphModule                        | nothing         |
| `canonicalise`      | a GraphModule                  | the same, computed weights folded    | the GraphModule |
| `fold`              | a GraphModule                  | the same, norms folded into layers   | the GraphModule |
| `deepen`            | GraphModules of other depths   | them, with the deepest one's blocks  | nothing         |
| `widen`             | GraphModules of other widths   | them, as wide as the widest          | nothing         |
| `align`             | the models' GraphModules       | `Alignment`: the nodes they share    | nothing         |
| `analyse`           | a GraphModule, example inputs  | `ChannelSpec`: the channel spaces    | nothing         |
| `linearity`         | a GraphModule, its spec        | the spec: which spaces are linear    | nothing         |
| `cut`               | alignment, spec                | `Cuts`, costs; a `MergePlan`         | nothing         |
| `points`            | a GraphModule, spec            | the merge points of each space       | nothing         |
| `observe`           | alignment, points, loader      | `Moments` of each space              | nothing         |
| `choose`            | candidates, how good each is   | the method, or the cut, to merge by  | nothing         |
| `allocate`          | spec, moments, a budget        | how many channels each space gets    | nothing         |
| `maps`              | spec, moments, weights, method | a `MergeMap` for each space          | nothing         |
| `match`             | spec, moments                  | a `MergeMap` for each space          | nothing         |
| `blocks`            | spec, moments                  | the maps of blocks of channels       | nothing         |
| `match_weights`     | spec, weights                  | a `MergeMap` for each space          | nothing         |
| `allocate`          | spec, moments, costs, budget   | how many channels each space gets    | nothing         |
| `resize`            | a GraphModule, spec, sizes     | `Resized`: it in other sizes         | nothing         |
| `split`             | a `MergePlan`                  | `Split`: trunk and heads             | nothing         |
| `verify`            | a `MergePlan`                  | how far a self-merge by it is off    | nothing         |
| `refit`             | trunk, heads, plan, loader     | how many layers were solved          | trunk and heads |
| `stitch`            | graphs that share nothing      | one that goes on from another's maps | nothing         |
| `polish`            | trunk, heads, plan, images     | how many steps were taken            | trunk and heads |
| `recalibrate`       | a network, loader              | how many BatchNorms were reset       | the network     |
| `join`              | heads, how outputs become one  | one head                             | nothing         |
| `compare`           | trunk, heads, plan, images     | `Fidelity`: how well it answers      | nothing         |
| `reuse`             | a GraphModule                  | nothing                              | the GraphModule |
| `restore`           | trunk, head, a parent's graph  | the values of the parent's tensors   | nothing         |
| `permute`           | spec, a model                  | a copy with channels in other orders | nothing         |
| `linearise`         | a GraphModule, its spec        | a copy, its LayerNorms as RMSNorms   | nothing         |
| `rotate`            | spec, a linearised network     | a copy with linear spaces turned     | nothing         |

Each is usable alone. A pass that has grown is a package with its verb on its face: ``from fxzip.passes.trace import
trace``.
"""
