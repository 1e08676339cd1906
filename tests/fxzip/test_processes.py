"""Several processes that share one merge, by torchrun: the merge of one, of the same bits in all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fxzip.data.loaders import Interleaved
from fxzip.data.shares import Share
from fxzip.errors import OptionError, ProcessError
from fxzip.processes import ALONE, Processes, processes_of

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests" / "fxzip" / "ranks.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def results(folder: Path, case: str, count: int) -> list[dict[str, Any]]:
    """What each process wrote."""
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes got, the third of them alone in the case ``two``."""
    folder = tmp_path_factory.mktemp("three")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", SCRIPT]
    cases = ["whole", "two", "few", "shuffled", "sampler", "other", "fails"]
    ran = subprocess.run([*command, str(folder), *cases], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def test_every_process_ends_with_the_same_bits(three: Path) -> None:
    for case, count in (("whole", 3), ("two", 2), ("few", 3), ("shuffled", 3), ("sampler", 3)):
        first, *others = results(three, case, count)
        for other in others:
            assert {**other, "warned": []} == {**first, "warned": []}, case


def test_it_is_the_merge_of_one_process(three: Path) -> None:
    """8 batches in shares of 3, 3 and 2, the last one smaller; or of 4 and 4."""
    alone = results(three, "two", 3)[2]
    for found in (results(three, "whole", 3)[0], results(three, "two", 2)[0]):
        assert found["images"] == alone["images"] == [37, 113]
        assert found["refitted"] == alone["refitted"]
        assert [each.split()[0] for each in found["tried"]] == [each.split()[0] for each in alone["tried"]]
        for mine, wanted in zip(found["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.tensor(found["fidelity"]), torch.tensor(alone["fidelity"]))


def test_a_process_without_images_takes_part(three: Path) -> None:
    found = results(three, "few", 3)
    assert found[2]["images"] == [19, 56]
    assert found[2]["refitted"] > 0


def test_only_the_first_process_warns(three: Path) -> None:
    warned = [each["warned"] for each in results(three, "whole", 3)]
    assert warned[0]
    assert warned[1:] == [[], []]


def test_shares_of_a_loader_that_shuffles_do_not_overlap(three: Path) -> None:
    """What differs is the order: the paper's rule with BatchNorms reset comes out much the same."""
    found, alone = (torch.tensor(results(three, case, 3)[2]["weights"][1]) for case in ("shuffled", "two"))
    assert (found - alone).norm() < 0.02 * alone.norm()


def test_processes_with_other_models_are_told(three: Path) -> None:
    for found in results(three, "other", 3):
        assert "model 1 of process 1 has other weights than that of process 0" in found["error"]


def test_what_fails_in_one_process_fails_in_all(three: Path) -> None:
    own, other = (
        "OSError: the disk is gone",
        "ProcessError: observing failed in process 1 of 3: OSError: the disk is gone",
    )
    assert [found["error"] for found in results(three, "fails", 3)] == [other, own, other]


@pytest.mark.parametrize("trouble", ["killed", "stalls"])
def test_a_process_that_is_gone_is_an_error_in_the_others(trouble: str, tmp_path: Path) -> None:
    """Started by hand: torchrun would end the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, str(tmp_path), trouble], env={**env, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        ranks[0].wait(60)
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    (found,) = results(tmp_path, trouble, 1)
    assert "observing: another of the 2 processes has ended, or did not answer within the" in found["error"]


class Part(Processes):
    """One of several, that only reads."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__()
        self.rank, self.count = rank, count


class Numbers(IterableDataset[int]):
    """Ten numbers, in this order only."""

    def __iter__(self) -> Any:
        return iter(range(10))


DATA = TensorDataset(torch.arange(10))
OTHER = TensorDataset(torch.arange(10, 14))


@pytest.mark.parametrize(
    "loader",
    [
        list(range(10)),
        DataLoader(DATA, 3),
        DataLoader(DATA, batch_size=None),
        DataLoader(Numbers(), 3),
        Interleaved([DataLoader(DATA, 2), DataLoader(OTHER, 2)]),
        Interleaved([DataLoader(DATA, 2), (torch.ones(2), torch.zeros(2))]),
    ],
)
def test_shares_are_the_whole(loader: Any) -> None:
    whole = [str(batch) for batch in loader]
    shares = [[str(batch) for batch in Share(loader, Part(rank, 3))] for rank in range(3)]
    assert [shares[k % 3][k // 3] for k in range(len(whole))] == whole
    assert sum(map(len, shares)) == len(whole)


def test_single_batches_are_asked_for() -> None:
    read: list[int] = []

    class Told(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)

    assert len(list(Share(DataLoader(Told(torch.arange(10)), 2), Part(1, 2)))) == 2
    assert read == [2, 3, 6, 7]


def test_some_of_the_loaders_split() -> None:
    sampler = torch.utils.data.DistributedSampler(DATA, num_replicas=2, rank=0)
    with pytest.raises(OptionError, match="some of the loaders have a DistributedSampler"):
        iter(Share(Interleaved([DataLoader(DATA, 2, sampler=sampler), DataLoader(OTHER, 2)]), Part(0, 2)))


def test_one_process_is_alone() -> None:
    assert processes_of() is ALONE
    assert processes_of(False) is ALONE
    with pytest.raises(ProcessError, match="process_group=2: give a group"):
        processes_of(2)
