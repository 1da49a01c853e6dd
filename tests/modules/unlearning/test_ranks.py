"""Two processes give the rows, the figures, the losses and the edit of one with the same global batches."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")
NAMES = ("independent", "joint", "one after the other")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, pair):
    out = tmp_path_factory.mktemp("ranks")
    pair.run(SCRIPT, out)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, one_thread, runs):
    folder = tmp_path_factory.mktemp("one")
    return {name: run(folder) for name, run in runs.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name, strategy, one_process, two_processes, same):
    alone, together = one_process[name], {}
    for rank in two_processes:
        found = rank[f"{name} {strategy}"]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["edit"], alone["edit"], rtol=1e-5, atol=1e-5)
        same(found["figures"], alone["figures"])
        assert not together.keys() & found["rows"].keys()
        together |= found["rows"]
    same(together, alone["rows"])


def test_all_ways_are_compared(one_process):
    assert set(one_process) == set(NAMES)
    assert len(one_process["joint"]["losses"]) > 2
    assert any(name.startswith("deleted/") for name in one_process["one after the other"]["figures"])
