"""Two processes give the losses, the gradients, the answers and the figures of one with the same global batches."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")
NAMES = ("one task a batch", "mixed, an adapter per task", "sparse mask")
NAMES += ("kinds per site", "hyperformer, recomputed", "ladder, recomputed", "all, recomputed")


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
def test_two_processes_are_one(name, strategy, one_process, two_processes):
    alone, together = one_process[name], {}
    assert len(alone["losses"]) > 1
    for rank in two_processes:
        found = rank[f"{name} {strategy}"]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
        assert found["gradients"].keys() == alone["gradients"].keys()
        for tensor, expected in alone["gradients"].items():
            assert (found["gradients"][tensor] - expected).norm() < 1e-5 * expected.norm() + 1e-8, tensor
        figures = {key: value for key, value in alone["logged"].items() if key.startswith(("val", "test"))}
        assert {key: found["logged"][key] for key in figures} == pytest.approx(figures)
        assert not together.keys() & found["answers"].keys()
        together |= found["answers"]
    assert together == alone["answers"]


def test_all_ways_are_compared(one_process):
    assert set(one_process) == set(NAMES)
