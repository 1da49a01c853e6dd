"""NaN and infinity in loss, gradients or weights: found before they do harm, and named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

SHOWN = 8  # ids of samples in a message


class NotFiniteError(RuntimeError):
    """Training cannot go on from a loss, gradient or weight that is NaN or infinite."""


class FiniteCheck(pl.Callback):
    """Stops the run, or leaves the step out, where loss or gradients are not finite.

    Hooks: before every optimizer step the losses of its batches and all gradients are checked, on all ranks together,
    so that every rank does the same; where a gradient scaler runs, infinite gradients are its business. Before a
    checkpoint is written the trained weights are checked, so that the files of the last finite weights stay. Costs one
    pass over the gradients per step, and on a GPU one wait for it. In checkpoints: how many steps were left out.

    Args:
        action: ``"stop"`` raises `NotFiniteError`; ``"skip"`` leaves weights and optimizer state as they are and goes
            on with the next batch, the schedule moving on. Weights that are not finite stop the run in any case.
        patience: with ``"skip"``, so many steps in a row may be left out before the run stops.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        self.action, self.patience = action, patience
        self.skipped = self.in_a_row = 0
        self._losses: list[tuple[Tensor, list[str]]] = []
        self._ids: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out, in all and just before."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember whose loss comes next."""
        self._ids = list(batch["id"]) if isinstance(batch, dict) and "id" in batch else [f"batch {batch_idx}"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss; it is read once per optimizer step."""
        self._losses.append((loss.detach(), self._ids))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the losses since the last step, and the gradients before they are clipped."""
        losses, self._losses = self._losses, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        fine = torch.stack([*(loss.isfinite().all() for loss, _ in losses), all_finite(gradients, pl_module.device)])
        if not any_rank(trainer, not bool(fine.all())):
            self.in_a_row = 0
            return
        message = self._describe(trainer, pl_module, losses)
        weights = first_not_finite((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
        hopeless = any_rank(trainer, weights is not None)
        if self.action == "stop" or hopeless or self.in_a_row >= self.patience:
            raise NotFiniteError(message)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        for parameter in pl_module.parameters():
            parameter.grad = None  # an optimizer leaves such a parameter and its state alone
        rank_zero_warn(f"{message}\nThe step is left out ({self.skipped} in all).")

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule, losses: list[tuple[Tensor, list[str]]]) -> str:
        """One text for all ranks. A collective."""
        bad = [(float(loss), ids) for loss, ids in losses if not loss.isfinite().all()]
        named = list(module.named_parameters())
        own = {
            "loss": [f"loss {value} on {some(ids)}" for value, ids in bad],
            "ids": [i for _, ids in losses for i in ids],
            "weight": first_not_finite((n, p) for n, p in named if p.requires_grad),
            "gradient": first_not_finite((n, p.grad) for n, p in named if p.grad is not None),
        }
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.all_gather_object(ranks, own)
        lines = [f"step {trainer.global_step}: not finite"]
        for number, rank in enumerate(ranks):
            where = f" (rank {number})" if len(ranks) > 1 else ""
            lines += [f"  {text}{where}" for text in rank["loss"]]
        for kind in ("weight", "gradient"):
            name = next((rank[kind] for rank in ranks if rank[kind]), None)
            lines += [f"  first {kind}: {name}"] if name else []
        if not any(rank["loss"] for rank in ranks):
            lines.append(f"  samples of the step: {some([i for rank in ranks for i in rank['ids']])}")
        return "\n".join(
            [*lines, "Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at the data."]
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to write weights that are not finite over those that were."""
        name = first_not_finite((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
        if any_rank(trainer, name is not None):
            raise NotFiniteError(
                f"step {trainer.global_step}: the trained weights are not finite"
                f"{f', the first is {name}' if name else ''}; no checkpoint is written, the last one stays as it is"
            )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """0-d bool on ``device``: whether every entry is finite."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # a rank may hold an empty slice
    if not tensors:
        return torch.ones((), dtype=torch.bool, device=device)
    # The largest absolute value is infinite or NaN exactly where some entry is; no norm can overflow on the way.
    return torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all()


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with an entry that is NaN or infinite."""
    return next((name for name, tensor in named if not local(tensor.detach()).isfinite().all()), None)


def any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether any rank says so. A collective."""
    if trainer.world_size == 1:
        return flag
    value = torch.tensor(float(flag), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(value, reduce_op="max") > 0)


def some(ids: list[str]) -> str:
    """The first few ids, and how many more there are."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{ids[:SHOWN]}{more}"
