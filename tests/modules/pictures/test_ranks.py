"""Two processes under DDP: coefficients as on one process, one classifier on both, every picture counted once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import read_manifest

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def folder(experts, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), *(str(each[2]) for each in experts.values())],
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(t[-3000:] for t in texts)
    return out


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_coefficients_are_those_of_one_process(results, experts, kit, tmp_path):
    one = kit.fitted_coefficients([each[2] for each in experts.values()], kit.trainer(tmp_path, max_epochs=2))
    first, second = (each["coefficients"] for each in results)
    assert torch.equal(first, second)
    assert (first - 0.3).abs().max() > 0.05
    # Sums in another order; Adam divides small gradients by their size.
    torch.testing.assert_close(first, one.coefficients.detach(), rtol=1e-3, atol=1e-4)


def test_the_artefact_is_written_once(folder):
    manifest = read_manifest(folder / "artefacts" / "merged-ada_merging")
    assert manifest.facts["steps"] > 0
    assert len(manifest.parents) == 2


def test_both_processes_hold_one_classifier_and_count_every_picture_once(results, kit):
    first, second = results
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["pictures"] == second["pictures"] == [11.0]
    assert first["accuracy"] == second["accuracy"]


def test_where_the_artefact_cannot_be_written_both_processes_fail(results):
    assert [each["failure"] for each in results] == ["no space left", "rank 0 failed: OSError: no space left"]
