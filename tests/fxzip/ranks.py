"""What the tests of several processes start, by torchrun or by themselves: ``ranks.py FOLDER CASE ...``.

Each process writes what it got of each case to a JSON file.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxzip
from fxzip.errors import FxzipError
from fxzip.fidelity import Fidelity
from tests.nets import Residual, pair

IMAGES = torch.rand(150, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
OPTIONS: dict[str, Any] = {"refit": fxzip.RefitOptions(rounds=2, samples=4096), "progress": False}
RANK = int(os.environ.get("RANK", "0"))


def models() -> list[nn.Module]:
    """Two residual networks with BatchNorm and gates, float64, the same in each process."""
    torch.manual_seed(0)
    return pair(Residual, IMAGES[:16])


def digest(zipped: nn.Module) -> str:
    """A checksum of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in zipped.state_dict().items():
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


class Batches:
    """Batches that are read one after the other; the second process breaks down while they are observed."""

    def __init__(self, trouble: str) -> None:
        self.trouble, self.reads = trouble, 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        for number, batch in enumerate(IMAGES.split(15)):
            if RANK == 1 and self.reads == 3 and number == 5:
                self.break_down()
            yield batch

    def break_down(self) -> None:
        """Do as the case says."""
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "fails":
            raise OSError("the disk is gone")
        time.sleep(60)


def loader_of(case: str) -> Any:
    """The images of a case."""
    data = TensorDataset(IMAGES)
    if case == "few":
        return [IMAGES[:40], IMAGES[40:75]]  # the third process has none
    if case == "shuffled":
        return DataLoader(data, 20, shuffle=True)
    if case == "sampler":
        return DataLoader(data, 20, sampler=DistributedSampler(data, shuffle=False))
    if case in ("killed", "fails", "stalls"):
        return Batches(case)
    return IMAGES.split(20)  # 8 batches, the last one of 10


def merged(case: str, group: Any) -> dict[str, Any]:
    """The merge of a case, in this process."""
    nets, loader = models(), loader_of(case)
    if case == "other":
        nets[1].load_state_dict({name: value + RANK for name, value in nets[1].state_dict().items()})
    given = {**OPTIONS, "process_group": group}
    paper = fxzip.zip(*nets, loader, **{**given, "method": "zip", "refit": False})
    zipped = paper
    if case in ("whole", "two"):
        zipped = fxzip.zip(*nets, loader, method="auto", **given)
    if case == "few":
        zipped = fxzip.zip(*nets, loader, method="zip", **given)
    found = zipped.report.fidelity or Fidelity(0, 0, ())
    return {
        "digests": [digest(zipped), digest(paper)], "images": [found.images, found.fitted],
        "fidelity": [answer.unexplained for answer in found.answers] + [d.unexplained[0] for d in found.depths],
        "tried": zipped.report.tried, "refitted": zipped.report.refitted,
        "weights": [weights(zipped), weights(paper)],
    }  # fmt: skip


def weights(zipped: nn.Module) -> list[float]:
    """Some of the elements of each tensor."""
    floats = (value for value in zipped.state_dict().values() if value.is_floating_point())
    return torch.cat([value.flatten()[:50].double() for value in floats]).tolist()


def group_of(case: str) -> Any:
    """The process group of a case: ``two`` are the first two of three, and the third one is alone."""
    if case == "two":
        group = dist.new_group([0, 1])
        return group if RANK < 2 else False
    return None


def main() -> None:
    """Merge, and write what came of it, or the error."""
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    if set(cases) & {"killed", "stalls"}:
        dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    for case in cases:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                found = merged(case, group_of(case))
            except (FxzipError, OSError) as error:
                found = {"error": f"{type(error).__name__}: {error}"}
        found["warned"] = sorted({warning.category.__name__ for warning in heard if "fxzip" in warning.filename})
        Path(folder, f"{case}-{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
