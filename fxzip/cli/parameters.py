"""The options of the commands: types, names and help, in the groups that the help shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxzip.cli import options as read

_merging = partial(typer.Option, rich_help_panel="Merging")
_models = partial(typer.Option, rich_help_panel="Models")
_images = partial(typer.Option, rich_help_panel="Images")

# ---- what is given

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT", help="Two or more: .safetensors or .pth files, local-dir:FOLDER or hf-hub:REPO."
    ),
]
Network = Annotated[Path, typer.Argument(metavar="FOLDER", help="A merged network that fxzip saved.")]
Data = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="Images like those that the networks were trained on: a folder (with a folder for each task in it, if "
        "there are several), or an .npz with arrays called images or TASK.images. Labels are not used.",
    ),
]
LabelledData = Annotated[
    Path,
    typer.Option(
        metavar="PATH",
        help="Labelled images: a folder with a folder for each task, and in that one for each class; or an .npz with "
        "arrays called TASK.images and TASK.labels.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the merged network goes.")]

# ---- models

Model = Annotated[
    str | None,
    _models(metavar="NAME", help="timm:NAME or torchvision:NAME; local-dir: and hf-hub: checkpoints need none."),
]
Names = Annotated[
    list[str] | None,
    _models("--name", metavar="TASK", help="A task's name, once for each checkpoint; the files' names without."),
]
ModelArgs = Annotated[
    list[str] | None,
    _models("--model-arg", metavar="NAME=VALUE", help="An argument of the architecture, like img_size=32."),
]
Classes = Annotated[int | None, _models(min=1, help="Number of classes; the checkpoint's own without.")]
Ema = Annotated[bool, _models(help="Prefer averaged weights, where a checkpoint has both.")]
Device = Annotated[str, _models(metavar="DEVICE", help="Where the networks run: cpu, cuda, mps...")]

# ---- merging

Cut = Annotated[
    str | None,
    _merging(
        metavar="NAME",
        help="Where the heads begin: a module, a share of the layers like 0.5, or a budget like 'flops<=1.3x'; as "
        "late as can be without.",
    ),
]
Start = Annotated[
    str | None,
    _merging(
        metavar="NAME",
        help="Where merging starts: a module, or a share of the layers; what comes before is run for each network.",
    ),
]
Method = Annotated[
    str,
    _merging(
        metavar="NAME", help="How channels are matched: zip, select, permute, average, optimal, weights, dual or cca."
    ),
]
Alpha = Annotated[float | None, _merging(help="For zip: how readily merged channels merge again, 0 to 1.")]
Beta = Annotated[float | None, _merging(help="For zip: budget of merges within one model, 0 to 1.")]
Options = Annotated[
    list[str] | None,
    _merging("--option", metavar="NAME=VALUE", help="A further option of the method, like gamma=0.5."),
]
Points = Annotated[Literal["last", "all"], _merging(help="Merge points of a channel space.")]
Refit = Annotated[bool, _merging(help="Solve merged layers by least squares; the paper's rule without.")]
Ridge = Annotated[float | None, _merging(help="For refit: pull towards the paper's rule, 0 or more.")]
Rounds = Annotated[int | None, _merging(help="For refit: how often layers are solved in turn; 0 is faster.")]
Images = Annotated[int | None, _merging(help="For refit: most images that it takes, of those that are used.")]

# ---- images

Limit = Annotated[int | None, _images(min=1, help="Most images to use, evenly from all tasks.")]
Seed = Annotated[int, _images(min=0, help="Of the order and the choice of images.")]
BatchSize = Annotated[int, _images(min=1, help="Images in a batch.")]
Workers = Annotated[int, _images(min=0, help="Processes that read images.")]
Strict = Annotated[bool, _images("--strict", help="A broken image is an error; without, it is skipped.")]
InputSize = Annotated[
    Any,
    _images(parser=read.input_size, metavar="C,H,W", help="Size of the images; the architecture's own without."),
]
Mean = Annotated[Any, _images(parser=read.numbers, metavar="R,G,B", help="Mean that is subtracted from the pixels.")]
Std = Annotated[Any, _images(parser=read.numbers, metavar="R,G,B", help="What the pixels are divided by.")]
Interpolation = Annotated[str | None, _images(metavar="NAME", help="bilinear, bicubic, nearest...")]
CropPct = Annotated[float | None, _images(metavar="SHARE", help="Share of the resized image that is kept.")]
CropMode = Annotated[str | None, _images(metavar="NAME", help="center, squash or border.")]

# ---- every command

Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=read.read_options,
        is_eager=True,
        help="A YAML file with options; those of the command line come first.",
    ),
]
JsonPath = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the table there, too.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=read.set_debug, is_eager=True, help="Show the traceback of an error.")
]
