"""Run by test_ranks.py in each of two processes: the same fit and test under DDP and FSDP2."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from fulgurite.callbacks.strategy import ModelParallelStrategy


def main(stream, out):
    conftest = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("stream_conftest", conftest)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    results = {}
    for name in ("ddp", "fsdp2"):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp" if name == "ddp" else sharded,
            logger=False,
            max_epochs=-1,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[Losses()],
        )
        results[name] = helpers.run(trainer, Path(stream))
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(results, out)


class Losses(Callback):
    """Mean over ranks of every step's loss."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    main(*sys.argv[1:])
