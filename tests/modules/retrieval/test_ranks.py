"""Two processes give the loss, the gradients and the recalls of one with the same global batch."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def two_processes(captioned, tmp_path_factory, pair):
    out = tmp_path_factory.mktemp("ranks")
    pair.run(SCRIPT, out, captioned)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process(captioned, tmp_path_factory, one_thread, run_alone):
    return run_alone(tmp_path_factory.mktemp("one"), captioned)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_losses_and_gradients_are_those_of_one_process(strategy, one_process, two_processes):
    for rank in two_processes:
        found = rank[strategy]
        assert len(found["losses"]) == 2
        torch.testing.assert_close(found["losses"], one_process["losses"], rtol=1e-5, atol=1e-5)
        ours, theirs = found["gradients"][0], one_process["gradients"][0]
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() < 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_recalls_are_exactly_those_of_one_process(strategy, one_process, two_processes):
    together = {}
    for rank in two_processes:
        found = rank[strategy]
        assert found["variants"] == one_process["variants"]
        assert not together.keys() & found["ranks"].keys()
        together |= found["ranks"]
        logged = {name: value for name, value in one_process["logged"].items() if name.startswith(("val", "test"))}
        assert {name: found["logged"][name] for name in logged} == pytest.approx(logged)
    assert together == one_process["ranks"]
