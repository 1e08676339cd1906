"""As a new user would: the wheel in a fresh environment, and the README's commands on two checkpoints.

The environment borrows torch and its like from the one that the tests run in; fxzip itself comes from the wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.test_package import ROOT, wheel  # noqa: F401  a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CLASSES = {"dogs": 5, "birds": 7}
IMAGES_OF_A_CLASS = 3

MAKE = """
import sys
from pathlib import Path
import numpy as np, timm, torch
from PIL import Image
from safetensors.torch import save_file

torch.set_num_threads(1)
noise = np.random.default_rng(0)
for seed, (task, classes) in enumerate({"dogs": 5, "birds": 7}.items()):
    torch.manual_seed(seed)
    pictures = []
    for label in range(classes):
        folder = Path("IMAGES", task, f"class{label}")
        folder.mkdir(parents=True)
        colour = noise.integers(40, 216, 3)
        for number in range(int(sys.argv[1])):
            pixels = np.clip(colour + noise.normal(0, 25, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            pictures.append(pixels)
    model = timm.create_model("test_resnet", num_classes=classes)
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    y = torch.arange(classes).repeat_interleave(int(sys.argv[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    save_file(model.state_dict(), f"{task}.safetensors")
"""

SERVE = """
import sys
for name in ("torch", "timm", "torchvision", "fxzip"):
    sys.modules[name] = None
from pathlib import Path
import json
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("merged.onnx")
said = session.get_modelmeta().custom_metadata_map
recipe, labels = json.loads(said["fxzip.preparation"]), json.loads(said["fxzip.labels"])
size = recipe["input_size"][1]
larger = int(size // recipe["crop_pct"])
edge = round((larger - size) / 2)
method = getattr(Image.Resampling, recipe["interpolation"].upper())

def prepare(path):
    image = Image.open(path).resize((larger, larger), method).crop((edge, edge, edge + size, edge + size))
    return ((np.asarray(image) / 255 - recipe["mean"]) / recipe["std"]).transpose(2, 0, 1).astype(np.float32)

(images,) = session.get_inputs()
found = {}
for task in ("dogs", "birds"):
    paths = sorted(Path("IMAGES", task).glob("*/*.png"))
    found[task + ".x"] = np.stack([prepare(path) for path in paths])
    found[task] = session.run([task], {images.name: found[task + ".x"]})[0]
    found[task + ".labels"] = np.array([int(path.parent.name.removeprefix("class")) for path in paths])
np.savez("served.npz", **found)
scores = session.run(["dogs"], {images.name: prepare("IMAGES/dogs/class0/1.png")[None]})[0][0]
chances = np.exp(scores - scores.max())
print(labels["dogs"][scores.argmax()], (chances / chances.sum()).max())
"""

COMPARE = """
import numpy as np, torch, fxzip
from PIL import Image
from fxzip.recipe import read_recipe
from pathlib import Path

print(fxzip.__file__)
zipped, served = fxzip.load("merged"), np.load("served.npz")
for task in zipped.names:
    with torch.no_grad():
        ours = zipped(torch.from_numpy(served[task + ".x"]), task=task).numpy()
    assert np.abs(ours - served[task]).max() < 1e-3 * np.abs(ours).max(), task
"""


def readme_commands() -> list[str]:
    """The lines of the README's block that merges checkpoints."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = (block for block in blocks if "fxzip zip" in block)
    return block.strip().splitlines()


@pytest.fixture(scope="module")
def home(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a fresh environment in .venv that has fxzip from the wheel."""
    home = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / ".venv"], check=True)
    python = home / ".venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel.filename)], check=True)
    (site,) = (home / ".venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def run(home: Path, *command: str) -> str:
    """Run a command as the user does: in his folder, with his environment first in the path."""
    bin_ = home / ".venv" / "bin"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_readme_from_the_wheel_to_onnxruntime(home: Path) -> None:
    run(home, "python", "-c", MAKE, str(IMAGES_OF_A_CLASS))
    # Its classes are called otherwise than those of the README, and its networks are small ones of the same kind.
    told = {}
    for line in readme_commands():
        mine = line.replace("beagle", "class0").replace("timm:resnet18", "timm:test_resnet")
        told[line.split()[1]] = run(home, "bash", "-ec", mine)
    assert list(told) == ["inspect", "zip", "eval", "predict", "export", "draw", "report"]
    assert "valid cuts" in told["inspect"]

    label, score = run(home, "python", "-c", SERVE).split()
    (predicted,) = re.findall(r"dogs: (\S+) ([\d.]+)%", told["predict"])
    assert predicted[0] == label
    assert float(predicted[1]) == pytest.approx(100 * float(score), abs=1)
    where = Path(run(home, "python", "-c", COMPARE).strip())
    assert where.is_relative_to(home / ".venv")

    served = np.load(home / "served.npz")
    (row,) = re.findall(r"dogs \+ birds +([\d.]+) +([\d.]+)", told["eval"])
    for task, percent in zip(CLASSES, row, strict=True):
        assert served[task].shape == (CLASSES[task] * IMAGES_OF_A_CLASS, CLASSES[task])
        right = (served[task].argmax(1) == served[f"{task}.labels"]).mean()
        assert f"{100 * right:.1f}" == percent
    alone = re.findall(r"alone .*?([\d.]+)", told["eval"])
    assert len(alone) == 2
