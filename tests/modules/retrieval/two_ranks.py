"""Run by test_ranks.py in each of two processes: a model trains and is tested, under DDP and FSDP2."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from fulgurite.callbacks.strategy import ModelParallelStrategy


def main(out, root):
    spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    results = {}
    for name in ("ddp", "fsdp2"):
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        strategy = "ddp" if name == "ddp" else sharded
        results[name] = kit.trained_and_tested(Path(out), Path(root), devices=2, strategy=strategy)
    torch.save(results, Path(out) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    main(*sys.argv[1:])
