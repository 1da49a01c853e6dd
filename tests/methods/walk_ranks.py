"""Run by test_walk_ranks.py in two processes: compresses models, whole and sharded, each with every other batch.

A model with packed attention is scored as a whole too, by all that tells a compressor what to do.
"""

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
from fulgurite.methods.packed_attention import exposed_attention
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.iterative import Iterative
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.bit_budget import BitBudget
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.tacq import TaskCircuit
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


class AttentionBlock(nn.Module):
    """Attention of torch, whose weights go to a function, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + torch.tanh(self.out(x))


class Model(nn.Module):
    """Words to words."""

    def __init__(self, block=Block):
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(8, 40)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model(block=Block):
    torch.manual_seed(0)
    return Model(block).double().eval()


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


def scored(name, ranks=ALONE):
    """What ``name`` finds out about a model with packed attention, as tensors by name."""
    own = model(AttentionBlock)

    def loss(ids):
        return nn.functional.cross_entropy(own(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    walk = LayerWalk(own, SPEC, batches()[ranks.rank :: ranks.size], own, ranks=ranks)
    quantizer = Gptq(3, group_size=4)
    with exposed_attention(own), torch.no_grad():
        if name == "iterative":
            return Iterative(0.5, rounds=2, samples=None).find(walk, loss)
        if name == "circuit":
            return TaskCircuit(0.1).masks(walk, loss, quantizer)
        if name == "budget":
            errors = BitBudget(3.0, [2, 4]).errors(walk, quantizer)
            return {layer: torch.tensor([*each.values()], dtype=torch.float64) for layer, each in errors.items()}
        if name.startswith("ecoflap"):
            found = Ecoflap(order=name.removeprefix("ecoflap-"), samples=None).importance(walk, loss)
            return {layer: torch.tensor(value, dtype=torch.float64) for layer, value in found.items()}
        quantizer.begin(matrices(walk))
        weights = TokenImportance(name.removeprefix("tokens-"), num_centroids=4)
        return {
            layer: result.weight
            for block in compressed_blocks(walk, quantizer, token_weights=weights)
            for layer, result in block.results.items()
        }


def failing(ranks):
    """Compress a model of which one rank's blocks fail, in a pass between two of them."""
    own = model()
    for block in compressed_blocks(LayerWalk(own, SPEC, batches()[ranks.rank :: 2], own, ranks=ranks), Magnitude(0.5)):
        if ranks.rank:
            block.block.module.forward = lambda x: x.no_such_thing


def main(root, *scores):
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
    for name in scores:
        write_tensors(root / f"{name}-{rank}", {key: each.contiguous() for key, each in scored(name, ranks).items()})
    try:
        failing(ranks)
    except (AttributeError, RuntimeError) as error:
        (root / f"failed-{rank}").write_text(str(error))
    own = sharded("blocks")
    try:
        next(iter(LayerWalk(own, SPEC, batches()[: rank + 1], own, ranks=ranks)))
    except ValueError as error:
        (root / f"refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
