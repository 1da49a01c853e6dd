"""Run by test_walk_ranks.py in two processes: compresses a model, each process with every other batch."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.structure import ModelSpec, Tower

COMPRESSORS = {"wanda": Wanda(0.5), "gptq": Gptq(4, group_size=4)}
SPEC = ModelSpec((Tower("text", r"blocks\.\d+", 2, 8),))


class Block(nn.Module):
    """Gated units, and one of two experts by the parity of the number of tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), *(nn.Linear(8, 12) for _ in "gu"), nn.Linear(12, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + torch.tanh(self.experts[x.shape[1] % 2](x))


class Model(nn.Module):
    """Words to words."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 40)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model():
    torch.manual_seed(0)
    return Model().double().eval()


def batches():
    """Of one process; of two, the first has those of even length alone."""
    return [torch.randint(3, 40, (2, 6 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def compressed(name, own, ranks=ALONE):
    """Errors by layer, after ``own`` was compressed."""
    walk = LayerWalk(
        own,
        SPEC,
        batches()[ranks.rank :: ranks.size],
        own,
        lambda ids, names: dict.fromkeys(names, (ids != 7).long()),
        ranks,
    )
    compressor = COMPRESSORS[name]
    compressor.begin(matrices(walk))
    return {layer: each.error for done in compressed_blocks(walk, compressor) for layer, each in done.reports.items()}


def main(root, address, rank):
    dist.init_process_group("gloo", address, timedelta(seconds=120), rank=rank, world_size=2)
    for name in COMPRESSORS:
        own = model()
        errors = compressed(name, own, Ranks(rank, 2))
        write_tensors(root / f"{name}-{rank}", {**own.state_dict(), "errors": torch.tensor([*errors.values()])})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
