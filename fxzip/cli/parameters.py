"""The options of the commands: types, names and help, in the groups that the help shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxzip.cli import options as read
from fxzip.settings import AUTO, MATCHING

_merging = partial(typer.Option, rich_help_panel="Merging")
_models = partial(typer.Option, rich_help_panel="Models")
_images = partial(typer.Option, rich_help_panel="Images")

_OWN = "; default: the architecture's own."
_FURTHER = ". ".join(
    f"{name} of {method}: {setting}"
    for method, settings in MATCHING.items()
    for name, setting in settings.items()
    if name not in read.DECLARED
)

# ---- what is given

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT",
        help="Two or more checkpoints: .safetensors or .pth files, local-dir:FOLDER or hf-hub:REPO.",
    ),
]
Checkpoint = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT", help="One checkpoint: a .safetensors or .pth file, local-dir:FOLDER or hf-hub:REPO."
    ),
]
Network = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="A merged network that fxzip saved; or hf-hub:OWNER/NAME, from the hub."),
]
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
        help="Labelled images: a folder with a folder for each task, which has a folder for each class; or an .npz "
        "with arrays called TASK.images and TASK.labels. For language models an .npz with TASK.tokens and, where "
        "sequences are padded, TASK.mask.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder even if it holds a merged network or other files.")
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write the merged network to.")]

# ---- models

Model = Annotated[
    str | None,
    _models(
        metavar="NAME",
        help="The architecture, timm:NAME or torchvision:NAME; with --stitch one for each checkpoint, with commas "
        "between. Not needed for local-dir: and hf-hub: checkpoints.",
    ),
]
Names = Annotated[
    list[str] | None,
    _models(
        "--name",
        metavar="TASK",
        help="Name of a task, once for each checkpoint, in their order; default: the files' names.",
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    _models("--model-arg", metavar="NAME=VALUE", help="An argument of the architecture, like img_size=32."),
]
Classes = Annotated[int | None, _models(min=1, help="Number of classes; default: the checkpoint's own.")]
Ema = Annotated[bool, _models(help="Prefer averaged (EMA) weights where a checkpoint has both.")]
Device = Annotated[str, _models(metavar="DEVICE", help="Device that the networks run on: cpu, cuda, mps...")]

# ---- merging

Cut = Annotated[
    str | None,
    _merging(
        metavar="NAME",
        help="Where the heads begin: a module, a share of the layers like 0.5, or a budget like 'flops<=1.3x'; "
        "default: as late as possible.",
    ),
]
Start = Annotated[
    str | None,
    _merging(
        metavar="NAME",
        help="Where merging starts: a module, or a share of the layers; before it each "
        "network keeps its own layers; default: at the input.",
    ),
]
Width = Annotated[
    list[str] | None,
    _merging(
        metavar="FACTOR",
        help="How many channels the trunk has, as a share of one network's: 1.15, or for a module or channel space "
        "layer1=1.3 (once for each); default: as many.",
    ),
]
Budget = Annotated[
    str | None,
    _merging(
        metavar="BOUND",
        help="What the merged network may cost, 'flops<=1.2x' or 'params<=1.5x' of one network, or is to keep, "
        "'fidelity>=0.98': the widths are found.",
    ),
]
Heads = Annotated[
    str,
    _merging(
        help="A head for 'each' task; or one answer from all, for networks of the same classes: the 'mean' of their "
        "outputs, or the 'product' of their probabilities; or 'concat': all classes in one list.",
    ),
]
Stitch = Annotated[
    bool,
    _merging(
        "--stitch",
        help="For two networks that share nothing: the trunk is one of them up to a place (--cut says what it may "
        "cost, default 'flops<=1.5x'), and the other goes on from there.",
    ),
]
Method = Annotated[
    str,
    _merging(metavar="NAME", help=f"How channels are matched: {', '.join((AUTO, *MATCHING))}."),
]
Alpha = Annotated[float | None, _merging(help=f"For zip: {read.DECLARED['alpha']}.")]
Beta = Annotated[float | None, _merging(help=f"For zip: {read.DECLARED['beta']}.")]
Options = Annotated[
    list[str] | None,
    _merging("--option", metavar="NAME=VALUE", help=f"A further option of the method. {_FURTHER}."),
]
Points = Annotated[
    Literal["last", "all"],
    _merging(help="Match a channel space by its activations at the last place that uses it, or at all places."),
]
Refit = Annotated[
    bool, _merging(help="Solve merged layers by least squares; --no-refit: merge by ZipIt!'s rule alone.")
]
Verify = Annotated[bool, _merging(help="Check the merge before it is fitted: a network merged with itself is itself.")]
HoldBack = Annotated[
    bool, _merging(help="Hold back a tenth of the images, to measure the merge on what it did not see.")
]
Effort = Annotated[
    Literal["fast", "default", "thorough"], _merging(help="How much time refit takes; the three below are set by it.")
]
Ridge = Annotated[float | None, _merging(help=f"For refit: {read.DECLARED['ridge']}.")]
Polish = Annotated[int | None, _merging(help=f"For refit: {read.DECLARED['polish']}.")]
Rounds = Annotated[int | None, _merging(help=f"For refit: {read.DECLARED['rounds']}.")]

KeepNorms = Annotated[
    bool,
    _merging(
        "--keep-norms",
        help="Leave BatchNorms in the network, so that they train; default: refit folds them into layers. With "
        "--no-refit they stay anyway.",
    ),
]

# ---- images

Limit = Annotated[
    int | None,
    _images(
        "--images",
        "--limit",
        min=1,
        metavar="NUMBER",
        help="Most images to use, spread evenly over the tasks; default: all.",
    ),
]
Seed = Annotated[int, _images(min=0, help="Seed for the choice and the order of images.")]
BatchSize = Annotated[int, _images(min=1, help="Number of images in a batch.")]
Workers = Annotated[int, _images(min=0, help="Number of processes that read images.")]
Strict = Annotated[bool, _images("--strict", help="Stop at an image that cannot be read; default: skip it.")]
InputSize = Annotated[
    Any,
    _images(parser=read.input_size, metavar="C,H,W", help=f"Channels, height and width of the images{_OWN}"),
]
Mean = Annotated[
    Any,
    _images(
        parser=read.numbers,
        metavar="R,G,B",
        help="Mean of each channel, subtracted from the pixels; default: the architecture's own.",
    ),
]
Std = Annotated[
    Any,
    _images(
        parser=read.numbers,
        metavar="R,G,B",
        help="Standard deviation of each channel, which divides the pixels; default: the architecture's own.",
    ),
]
Interpolation = Annotated[
    str | None, _images(metavar="NAME", help=f"How images are resized: bilinear, bicubic, nearest...{_OWN}")
]
CropPct = Annotated[
    float | None,
    _images(metavar="SHARE", help=f"Share of the resized image's side that the crop keeps{_OWN}"),
]
CropMode = Annotated[
    str | None, _images(metavar="NAME", help=f"How images are cropped: center, squash or border{_OWN}")
]

Labels = Annotated[
    list[str] | None,
    _images(
        "--labels",
        metavar="TASK=FILE",
        help="Names of a task's classes, one on each line of a file; default: the checkpoint's own, or the folders' of "
        "the images. They are saved with the network.",
    ),
]
ReportPath = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Also write the report as an HTML page.")
]

# ---- every command

Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What the merge may take, like 4GB: what it needs is estimated before the work."),
]
StatsDevice = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Device that moments are kept on; default: that of the networks."),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep in this folder what was done so far; after an interruption the same command goes on from there.",
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=read.read_options,
        is_eager=True,
        help="A YAML file with options; those given on the command line override it.",
    ),
]
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the results to this file, as JSON.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=read.set_debug, is_eager=True, help="Show the traceback of an error.")
]
