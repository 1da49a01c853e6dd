"""Run by test_strategy.py in two processes: trains under FSDP2, passes checkpoints between strategies."""

import json
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
from fulgurite.callbacks.finite import FiniteCheck
from fulgurite.callbacks.gradients import AccumulatedGradients
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.rng import RandomStates
from fulgurite.callbacks.strategy import ModelParallelStrategy
from fulgurite.checkpoints import CheckpointError, WriteError, digest_of_state
from fulgurite.checkpoints.atomic import inject_faults
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler


class Adapted(pl.LightningModule):
    """A frozen linear layer with a small trained part; only the latter is in `state_dict`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.backbone = nn.Linear(8, 16)
        self.adapter = nn.Sequential(nn.Linear(16, 5), nn.Dropout(0.2), nn.Linear(5, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.backbone.requires_grad_(False)
        self.frozen = {name: value.clone() for name, value in self.backbone.state_dict().items()}
        self.losses = []

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k.startswith("adapter.")}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        if strict:
            assert state_dict.keys() == self.state_dict().keys()
        # The names were compared above; only the frozen backbone may be missing.
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint):
        base = {"source": "seed 3", "digest": digest_of_state(self.frozen)}
        checkpoint["fulgurite"] = {"kind": "delta", "base": base}

    def configure_model(self):
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and not isinstance(self.adapter[0].weight, DTensor):
            for part in (self.backbone, self.adapter, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.adapter(torch.tanh(self.backbone(x)))

    def training_step(self, batch, index):
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


class Full(Adapted):
    """All of it trains, and is saved."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(True)
        self.register_buffer("seen", torch.zeros(()))

    def state_dict(self, *args, **kwargs):
        return pl.LightningModule.state_dict(self, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["fulgurite"] = {"settings": {"trained": "all"}}

    def training_step(self, batch, index):
        self.seen += 1
        return super().training_step(batch, index)


class InWindow(pl.Callback):
    """Saves in the middle of the second accumulation window."""

    def __init__(self, root):
        self.root = root

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.accumulate_grad_batches == 2 and (trainer.current_epoch, batch_idx) == (0, 2):
            trainer.save_checkpoint(self.root / "window")


def windows(root, results):
    """From inside a window: on with the same strategy, and with each other one."""
    strategies = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}
    for name, strategy in strategies.items():
        _, module = run(root / f"{name} windows", strategy(), 3, accumulate=2)
        results[f"{name} whole"] = module.losses[-3:]
    for saved in strategies:
        for name, strategy in strategies.items():
            folder = root / f"{name} from {saved}"
            _, module = run(folder, strategy(), 3, root / f"{saved} windows" / "window", accumulate=2)
            results[f"{name} from {saved}"] = module.losses[-3:]


def data():
    generator = torch.Generator().manual_seed(0)
    items = TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator))
    rank = int(os.environ.get("LOCAL_RANK", 0))
    return ResumableLoader(items, GlobalBatchSampler(32, 8, rank, 2))


def trainer(root, strategy, max_steps, devices=1, accumulate=1):
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[DigestCheckpointIO()],
        callbacks=[
            RandomStates(),
            FiniteCheck(),
            AccumulatedGradients(),
            InWindow(root),
            PublishedCheckpoint(every_n_epochs=1, save_top_k=-1),
        ],
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )


def run(root, strategy, max_steps, ckpt_path=None, devices=2, cls=Adapted, accumulate=1):
    """Fit to ``max_steps``; (trainer, module)."""
    pl.seed_everything(5)
    module, fitter = cls(), trainer(root, strategy, max_steps, devices, accumulate)
    fitter.fit(module, data(), data(), ckpt_path=ckpt_path)
    return fitter, module


def fill(module, rank):
    """Give each rank's slices, of weights and of Adam's moments, a value of their own."""
    (optimizer,) = module.trainer.optimizers
    with torch.no_grad():
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            parameter.to_local().fill_(100 * (rank + 1) + index)
            optimizer.state[parameter]["exp_avg"].to_local().fill_(1000 * (rank + 1) + index)


def full(root, results):
    """The same with everything trained: each rank writes its slices."""
    _, module = run(root / "full", ModelParallelStrategy(), 7, cls=Full)
    results["full"] = module.losses[-3:]
    saved = root / "full" / "checkpoints" / "epoch=0-step=4"
    _, module = run(root / "full resumed", ModelParallelStrategy(), 7, saved, cls=Full)
    results["full resumed"] = module.losses
    fitter, _ = run(root / "full ddp", DDPStrategy(), 4, saved, cls=Full)
    fitter.save_checkpoint(root / "full_ddp_from_fsdp")
    fitter, module = run(root / "full fsdp", ModelParallelStrategy(), 4, root / "full_ddp_from_fsdp", cls=Full)
    fitter.save_checkpoint(root / "full_fsdp_from_ddp")
    fill(module, fitter.global_rank)
    fitter.save_checkpoint(root / "full_filled")
    with inject_faults(refuse if fitter.global_rank else lambda point: None):
        try:
            fitter.save_checkpoint(root / "full_filled")
        except CheckpointError as error:
            results["refused"] = str(error)


def refuse(point):
    """The second rank's disk is full."""
    if point == "tensor_written":
        raise WriteError("cannot write the slices of rank 1: no space left")


def main(root: Path) -> None:
    results = {}
    # The checkpoint comes after a validation, which leaves whole parameters behind in some units.
    _, module = run(root / "unbroken", ModelParallelStrategy(), 7)
    results["unbroken"] = module.losses[-3:]
    fsdp = root / "unbroken" / "checkpoints" / "epoch=0-step=4"
    _, module = run(root / "resumed", ModelParallelStrategy(), 7, fsdp)
    results["resumed"] = module.losses
    fitter, _ = run(root / "ddp", DDPStrategy(), 4, fsdp)
    fitter.save_checkpoint(root / "ddp_from_fsdp")
    fitter, module = run(root / "fsdp", ModelParallelStrategy(), 4, root / "ddp_from_fsdp")
    fitter.save_checkpoint(root / "fsdp_from_ddp")
    fill(module, fitter.global_rank)
    fitter.save_checkpoint(root / "filled")
    (scores,) = fitter.validate(module, data(), ckpt_path=fsdp, verbose=False)
    results["val"] = scores["val/loss"]
    full(root, results)
    windows(root, results)
    (root / f"results_{fitter.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
