"""Gradients of an unfinished accumulation window, kept in checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor


class AccumulatedGradients(pl.Callback):
    """Keeps what ``accumulate_grad_batches`` has summed up so far, so that a run stopped inside a window loses nothing.

    When: stored while a checkpoint is made inside a window (elsewhere nothing is); put back at the first
    ``on_train_batch_start`` after a resume, since Lightning clears gradients before that. Every rank's own sums are
    stored, since under DDP they meet only at the end of a window; with another number of ranks each gets their mean,
    which is the same gradient up to rounding. Sharded gradients are sums over the ranks already, and each rank stores
    its slice; they go on with the same number of ranks only.
    """

    def __init__(self) -> None:
        self._module: pl.LightningModule | None = None
        self._trainer: pl.Trainer | None = None
        self._restore: list[dict[str, Tensor]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember whose gradients they are."""
        self._trainer, self._module = trainer, pl_module

    def state_dict(self) -> dict[str, Any]:
        """Gradients of all ranks, in order of rank. A collective inside a window."""
        if self._trainer is None or not self._window_is_open():
            return {}
        own = {name: local(p.grad).cpu() for name, p in self._module.named_parameters() if p.grad is not None}
        if self._trainer.world_size == 1:
            return {"ranks": [own]}
        ranks: list[Any] = [None] * self._trainer.world_size
        dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def _window_is_open(self) -> bool:
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        return trainer.accumulate_grad_batches > 1 and trainer.state.fn == "fit" and loop._should_accumulate()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the gradients until the first training batch."""
        self._restore = state_dict.get("ranks")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Put the rank's gradients back, once."""
        if self._restore is None:
            return
        parameters = dict(pl_module.named_parameters())
        if len(self._restore) == trainer.world_size:
            gradients = self._restore[trainer.global_rank]
        else:
            rank_zero_info(
                f"The checkpoint holds gradients of {len(self._restore)} ranks and this run has {trainer.world_size}: "
                "each rank goes on with their mean"
            )
            gradients = {n: torch.stack([r[n] for r in self._restore]).mean(0) for n in self._restore[0]}
        for name, gradient in gradients.items():
            put(parameters[name], gradient)
        self._restore = None


def local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def put(parameter: Tensor, gradient: Tensor) -> None:
    """Make ``gradient``, this rank's part, the gradient of ``parameter``."""
    if isinstance(parameter, DTensor):
        value = gradient.to(parameter.to_local().device)
        gradient = DTensor.from_local(
            value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        parameter.grad = gradient
    else:
        parameter.grad = gradient.to(parameter.device, copy=True)
