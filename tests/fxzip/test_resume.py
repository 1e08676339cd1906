"""A merge that is interrupted anywhere goes on where it was, and ends with the same bits; what was observed is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip import RefitOptions, journal
from fxzip.data import stores
from fxzip.errors import CalibrationError, FileFormatError, OptionError
from tests.fxzip.test_leftovers import net

IMAGES = torch.rand(120, 3, 4, 4, generator=torch.Generator().manual_seed(0))
BATCHES = list(IMAGES.split(10))
OPTIONS: dict[str, Any] = {"refit": RefitOptions(rounds=2), "progress": False}


class Stopped(Exception):
    """The interruption."""


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [net(0), net(1)]


@pytest.fixture(scope="module")
def whole(models: list[nn.Module]) -> dict[str, Tensor]:
    """What an unbroken run gives."""
    return fxzip.zip(*models, BATCHES, **OPTIONS).state_dict()


def same(found: fxzip.ZippedModel, wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("writes", [0, 1, 7, 13, 14, 16, 17, 18])
def test_interrupted_anywhere_it_ends_with_the_same_bits(
    models: list[nn.Module], whole: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """It is stopped while the n-th file is written: sums after each batch, then short fits, then layers."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    left, save = writes, stores.save_file

    def stopping(tensors: Any, path: Path, meta: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            Path(path).write_bytes(b"half of it")
            raise Stopped
        save(tensors, path, meta)

    monkeypatch.setattr(stores, "save_file", stopping)
    done = tmp_path / "done"
    if writes:
        with pytest.raises(Stopped):
            fxzip.zip(*models, BATCHES, resume=done, **OPTIONS)
        assert (done / "run.json").is_file()
    assert same(fxzip.zip(*models, BATCHES, resume=done, **OPTIONS), whole)
    assert not done.exists()


KILLED = """
import os, signal, sys
from tests.fxzip import test_resume as t
from fxzip import journal
from fxzip.passes.refit import records
journal.EVERY = 0.0
def killed(self, *_):
    os.kill(os.getpid(), signal.SIGKILL)
records.Records.write = killed
t.fxzip.zip(t.net(0), t.net(1), t.BATCHES, resume=sys.argv[1], **t.OPTIONS)
"""


def test_a_killed_process(models: list[nn.Module], whole: dict[str, Tensor], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "done")], env=environment, check=False)
    assert ran.returncode == -signal.SIGKILL
    observed = len(list((tmp_path / "done").glob("observed*")))
    assert observed == 1
    loader = Counted()
    assert same(fxzip.zip(*models, loader, resume=tmp_path / "done", **OPTIONS), whole)
    assert loader.read == 1 + len(BATCHES)  # the first one, and all of them for the fit


class Counted:
    """Batches, and how many were read."""

    read = 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in BATCHES:
            self.read += 1
            yield batch


def stop_while_observing(models: list[nn.Module], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run after some batches."""
    monkeypatch.setattr(journal, "EVERY", 0.0)
    loader = [*BATCHES[:6], torch.ones(1, 7)]
    with pytest.raises(CalibrationError, match="axes"):
        fxzip.zip(*models, loader, resume=folder, **OPTIONS)


def test_other_images_are_refused(models: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_while_observing(models, tmp_path / "done", monkeypatch)
    with pytest.raises(CalibrationError, match="other images than before the interruption"):
        fxzip.zip(*models, BATCHES[::-1], resume=tmp_path / "done", **OPTIONS)


def test_another_run_is_refused(models: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_while_observing(models, tmp_path / "done", monkeypatch)
    with pytest.raises(OptionError, match="the run that began there had method 'auto', now it is 'zip'"):
        fxzip.zip(*models, BATCHES, resume=tmp_path / "done", method="zip", **OPTIONS)
    with pytest.raises(OptionError, match="had the weights of task1"):
        fxzip.zip(models[0], net(5), BATCHES, resume=tmp_path / "done", **OPTIONS)
    (tmp_path / "mine.txt").write_text("not fxzip's")
    with pytest.raises(OptionError, match="holds other files"):
        fxzip.zip(*models, BATCHES, resume=tmp_path, **OPTIONS)


def test_what_was_observed_is_saved_and_loaded(models: list[nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "observed.safetensors"
    prepared = fxzip.prepare(*models, example_inputs=BATCHES[0], names=["a", "b"])
    with pytest.raises(CalibrationError, match="nothing was observed yet"):
        prepared.save(path)
    prepared.observe(BATCHES, points="all", progress=False).save(path)
    loaded = fxzip.Prepared.load(path, *models, BATCHES)
    assert loaded.names == ("a", "b")
    assert loaded.points.keys() == prepared.points.keys()
    assert (loaded.observed, loaded.held_back) == (prepared.observed, prepared.held_back)
    wanted = prepared.convert(method="permute", **OPTIONS)
    found = loaded.convert(method="permute", **OPTIONS)
    assert same(found, wanted.state_dict())
    assert found.report == wanted.report
    with pytest.raises(OptionError, match=r"model 0 \(a\) has other weights"):
        fxzip.Prepared.load(path, *reversed(models), BATCHES)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="cannot be read"):
        fxzip.Prepared.load(path, *models, BATCHES)
    with pytest.raises(FileFormatError):
        fxzip.Prepared.load(tmp_path / "none", *models, BATCHES)


def test_inputs_by_keyword_come_back(tmp_path: Path) -> None:
    given = fxzip.data.batches.Given((torch.ones(2), None, 3.5), {"mask": torch.zeros(2, 1), "flags": (True, [1])})
    tensors: dict[str, Tensor] = {}
    values = stores.packed([given], tensors, "held")
    stores.write_store(tmp_path / "a.safetensors", tensors, values)
    tensors, values = stores.read_store(tmp_path / "a.safetensors")
    (found,) = stores.unpacked(values, tensors)
    assert torch.equal(found.args[0], given.args[0])
    assert found.args[1:] == given.args[1:]
    assert torch.equal(found.kwargs["mask"], given.kwargs["mask"])
    assert found.kwargs["flags"] == (True, [1])


def test_networks_and_images_of_half_precision(tmp_path: Path) -> None:
    """What was read is told by its bits, whatever they stand for."""
    half, images = [net(seed).bfloat16() for seed in (0, 1)], [batch.bfloat16() for batch in BATCHES]
    kept = fxzip.zip(*half, images, resume=tmp_path / "kept", **OPTIONS)
    assert same(kept, fxzip.zip(*half, images, **OPTIONS).state_dict())
    assert all(p.dtype == torch.bfloat16 for p in kept.trunk.parameters())
