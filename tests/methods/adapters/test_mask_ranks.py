"""A sparse mask trains the same in one process and in two, under DDP and FSDP2."""

from pathlib import Path

import pytest
import torch
from mask_ranks import trained
from masked_net import build


@pytest.fixture(scope="module")
def root(tmp_path_factory, pair):
    root = tmp_path_factory.mktemp("masks")
    pair.run(Path(__file__).with_name("mask_ranks.py"), root)
    return root


@pytest.mark.parametrize("recompute", [None, False])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(how, recompute, root):
    one = trained("alone", recompute)
    two, other = (torch.load(root / f"{how}-{recompute}-{rank}.pt", weights_only=True) for rank in range(2))
    start = dict(build(density=0.3, score="magnitude")[0].named_parameters())
    for name, tensor in one.items():
        if name != "loss":
            assert torch.equal(two[name], other[name])
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)  # sums of gradients in another order
        if name.startswith("net."):
            assert torch.equal(two[name], start[name.removeprefix("net.")])
    assert torch.equal(two["positions"], one["positions"])
    assert not torch.equal(two["kept.embedding.weight"], two["net.embedding.weight"])
