"""Run by test_compress_ranks.py in each of two processes: chains of compression in fits, and masks that are kept."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.keep_masks import GradualPruning, KeepMasks
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.strategy import ModelParallelStrategy
from fulgurite.cli import main
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        self.net[2].weight.data[:, ::2] = 0

    def configure_model(self):
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and not isinstance(self.net[0].weight, DTensor):
            for part in (self.net[0], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def masks(root, strategy, devices=2, max_steps=6, ckpt_path=None):
    """A fit of `Net` with masks that stay and masks that grow, on one process or two."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator))
    rank = int(os.environ["LOCAL_RANK"]) if devices == 2 else 0
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[DigestCheckpointIO()],
        callbacks=[
            KeepMasks("net.2.weight"),
            KeepMasks("net.0.weight", GradualPruning(0.7, end=5, every=2)),
            PublishedCheckpoint(every_n_train_steps=3, save_top_k=-1, filename="{step}"),
        ],
        max_steps=max_steps,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(Net(), ResumableLoader(data, GlobalBatchSampler(32, 8, rank, devices)), ckpt_path=ckpt_path)


if __name__ == "__main__":
    root, plain, chain = map(Path, sys.argv[1:])
    codes = []
    for strategy in ("ddp", "fsdp2"):
        argv = ("--config", str(plain), "--config", str(chain), "--trainer.devices", "2")
        argv += ("--trainer.strategy", strategy)
        codes.append(main(["fit", *argv, "--run", str(root / strategy)]))
        masks(root / f"{strategy}-masks", {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}[strategy]())
    (pruned,) = (root / "fsdp2" / "artefacts").glob("pruned-*")
    run = root / "from"
    short = ("--trainer.callbacks", "null", "--trainer.max_epochs", "1")
    codes.append(main(["fit", *argv, *short, "--init_from", str(pruned), "--run", str(run)]))
    codes.append(main(["test", "--ckpt_path", str(run)]))
    saved = root / "fsdp2-masks" / "checkpoints" / "step=3"
    masks(root / "resumed-masks", ModelParallelStrategy(), ckpt_path=saved)
    (root / f"codes-{os.environ['LOCAL_RANK']}").write_text(" ".join(map(str, codes)))
