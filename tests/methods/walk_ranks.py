"""Run by test_walk_ranks.py in two processes: compresses models, whole and sharded, each with every other batch."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.sharding import reshard, whole
from fulgurite.methods.structure import ModelSpec, Tower

COMPRESSORS = {"magnitude": Magnitude(0.5, scope="global"), "wanda": Wanda(0.5), "gptq": Gptq(4, group_size=4)}
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
    """Of one process; of two, the first has none of odd length, and the second need look no further than its second."""
    lengths = (6, 7, 8, 10, 12, 9)
    return [torch.randint(3, 40, (2, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


def sharded(how):
    """A model whose blocks are units of FSDP2, and the rest too where ``how`` is ``root``."""
    own, mesh = model(), init_device_mesh("cpu", (2,))
    for block in own.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(own, mesh=mesh) if how == "root" else own


def compressed(name, own, ranks=ALONE, done=lambda block: None):
    """Errors by layer, after ``own`` was compressed; and what became of every block."""
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
    blocks = list(compressed_blocks(walk, compressor, done=done))
    errors = {layer: each.error for block in blocks for layer, each in block.reports.items()}
    return errors, {block.block.name: block.results for block in blocks}


def main(root):
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    ranks = Ranks(rank, 2)

    def keep(case, own, errors):
        reshard(own)
        state = {key: whole(tensor).contiguous() for key, tensor in own.state_dict().items()}
        write_tensors(root / f"{case}-{rank}", {**state, "errors": torch.tensor([*errors.values()])})

    for name in COMPRESSORS:
        errors, results = compressed(name, own := model(), ranks)
        keep(f"{name}-whole", own, errors)
        for how in ("blocks", "root"):
            errors, _ = compressed(name, own := sharded(how), ranks)
            keep(f"{name}-{how}", own, errors)
        known = {"blocks.0": results["blocks.0"]}
        errors, _ = compressed(name, own := sharded("blocks"), ranks, known.get)
        keep(f"{name}-resumed", own, errors)
    own = sharded("blocks")
    try:
        next(iter(LayerWalk(own, SPEC, batches()[: rank + 1], own, ranks=ranks)))
    except ValueError as error:
        (root / f"refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
