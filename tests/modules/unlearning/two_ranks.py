"""Run by test_ranks.py in each of two processes: items edited and attacked by themselves, and one edit for all."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from fulgurite.callbacks.strategy import ModelParallelStrategy


def main(out):
    spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    results = {}
    for strategy in ("ddp", "fsdp2"):
        for name, run in kit.RUNS.items():
            sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            given = {"devices": 2, "strategy": "ddp" if strategy == "ddp" else sharded}
            results[f"{name} {strategy}"] = run(out, **given)
    torch.save(results, Path(out) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    main(*sys.argv[1:])
