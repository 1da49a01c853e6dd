"""Gradients of an unfinished accumulation window, kept in checkpoints."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class AccumulatedGradients(pl.Callback):
    """Keeps what ``accumulate_grad_batches`` has summed up so far, so that a run stopped inside a window loses nothing.

    When: stored while a checkpoint is made inside a window (elsewhere nothing is); put back at the first
    ``on_train_batch_start`` after a resume, since Lightning clears gradients before that. Under DDP every rank's own
    sums are stored, since they meet only at the end of a window; with another number of ranks, or sharded, each gets
    their mean, which is the same gradient up to rounding. Sharded gradients are means over the ranks already and are
    stored whole, once; any number of ranks goes on with them.
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
        gradients = {name: p.grad for name, p in self._module.named_parameters() if p.grad is not None}
        sharded = any(isinstance(gradient, DTensor) for gradient in gradients.values())
        own = {n: (g.full_tensor() if isinstance(g, DTensor) else g).cpu() for n, g in gradients.items()}
        if self._trainer.world_size == 1 or sharded:
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
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
        if len(self._restore) == trainer.world_size and not sharded:
            gradients = self._restore[trainer.global_rank]
        else:
            gradients = {n: torch.stack([r[n] for r in self._restore]).mean(0) for n in self._restore[0]}
        for name, gradient in gradients.items():
            put(parameters[name], gradient)
        self._restore = None


def put(parameter: Tensor, gradient: Tensor) -> None:
    """Make ``gradient``, whole, the gradient of ``parameter``, cut as the parameter is."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        local_copy = gradient.to(mesh.device_type)
        parameter.grad = distribute_tensor(local_copy, mesh, parameter.placements, src_data_rank=None)
    else:
        parameter.grad = gradient.to(parameter.device, copy=True)
