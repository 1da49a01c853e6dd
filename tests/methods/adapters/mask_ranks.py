"""Trains a sparse mask in two processes, under DDP and FSDP2; also what test_mask_ranks.py compares it with."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from masked_net import build, loss_of, mask_of, words
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fulgurite.methods.adapters.mask_choice import common_entries
from fulgurite.methods.sharding import reshard, whole

STEPS = 4


class Owner(nn.Module):
    """Model and bank, whose forward pass is the loss."""

    def __init__(self, recompute):
        super().__init__()
        self.net, self.bank = build(density=0.3, score="magnitude")
        self.net.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
        self.net.recompute = recompute

    def forward(self, batch):
        return loss_of(self.net, batch)


def trained(how, recompute=None, rank=0, size=1):
    """Values, positions and the backbone after some steps, and after a renewal of the mask."""
    owner = model = Owner(recompute)
    if how == "ddp":
        model = DistributedDataParallel(owner)
    elif how == "fsdp2":
        for block in owner.net.blocks:
            fully_shard(block)
        fully_shard(owner)
    mask = mask_of(owner.bank)
    optimizer = torch.optim.SGD(owner.bank.parameters_of("live"), lr=0.05, momentum=0.9, weight_decay=0.1)
    out = {}
    for step in range(STEPS):
        for part in range(2):
            model(words(seed=2 * step + part)[rank::size]).backward()
        nn.utils.clip_grad_norm_([mask.values], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        out["loss"] = whole(model(words(seed=99)))
    reshard(owner)
    out |= {"values": whole(mask.values).clone(), "positions": mask.positions.clone()}
    out |= {f"net.{name}": whole(p).clone() for name, p in owner.net.named_parameters()}
    mask.set_scores({name: torch.arange(count).float() for name, count in mask.sizes.items()}, keep_dropped=True)
    out |= {"renewed": whole(mask.values).clone(), "places": mask.positions.clone()}
    out |= {f"kept.{name}": whole(p).clone() for name, p in owner.net.named_parameters()}
    assert 0 < len(common_entries(out["positions"], out["places"])[0]) < len(mask.positions)
    return {name: tensor.detach() for name, tensor in out.items()}


def main(root):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for how in ("ddp", "fsdp2"):
        for recompute in (None, False):
            torch.save(trained(how, recompute, rank, 2), root / f"{how}-{recompute}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
