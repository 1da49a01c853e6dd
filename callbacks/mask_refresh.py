"""Sparse masks that are chosen anew while their entries train."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from fulgurite.methods.adapters.mask_choice import common_entries
from fulgurite.methods.adapters.sparse_mask import WITHOUT_DATA, SparseMask
from fulgurite.methods.sharding import reshard, whole, write
from fulgurite.modules.adapted import AdaptedModule


class MaskRefresh(pl.Callback):
    """Renews the live set's `SparseMask`s every n optimizer steps, as training from scratch needs it (2111.09839).

    Entries that stay chosen keep their values and their optimizer state; entries that come in start at the backbone's
    weight, without momentum.

    Hooks: ``on_train_batch_end`` of the last batch of such a step, before a checkpoint of that step is written.
        ``train/mask_renewed``, the share of entries that came in, is logged.
    Stored: nothing here; masks and optimizer states are parts of the checkpoint. A resumed run renews at the same
        steps.
    Ranks: all come to the same scores, and so to the same mask. Scores from data need whole weights: under FSDP2, use
        ``random`` or ``magnitude``.

    Args:
        every_n_steps: optimizer steps between two masks.
        dropped: ``keep`` leaves entries that go out at their trained values, as published: they are written into the
            backbone, so that all sets stand on it and checkpoints hold it (self-contained). ``restore`` puts the
            pretrained weights back, so that checkpoints stay as small as the mask.
        last_step: after which the mask stays.
    """

    def __init__(
        self, every_n_steps: int, dropped: Literal["keep", "restore"] = "keep", last_step: int | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.dropped, self.last_step = every_n_steps, dropped, last_step
        self._step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module that has no mask, or cannot score it.

        Raises:
            MisconfigurationException: and says what is missing.
        """
        masks = masks_of(pl_module)
        if not masks:
            raise MisconfigurationException(
                f"MaskRefresh: no adapter of {type(pl_module).__name__} is a SparseMask; place one, or leave this out"
            )
        needing = [mask.score for mask in masks if mask.score not in WITHOUT_DATA]
        if needing and not hasattr(pl_module, "mask_scores"):
            raise MisconfigurationException(
                f'MaskRefresh: {type(pl_module).__name__} has no mask_scores to compute score="{needing[0]}" with; '
                'set score="magnitude" or "random"'
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run does not renew again what its checkpoint holds."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Renew, where it is time."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps or (self.last_step is not None and self._step > self.last_step):
            return
        reshard(pl_module)
        masks = masks_of(pl_module)
        renewed = sum(self._renew(mask, trainer, pl_module) for mask in masks)
        if self.dropped == "keep":
            pl_module.self_contained = True
            with pl_module.bank.use(None):
                pl_module.backbone.refresh()
        pl_module.log("train/mask_renewed", renewed / sum(len(mask.positions) for mask in masks))

    def _renew(self, mask: SparseMask, trainer: pl.Trainer, module: AdaptedModule) -> int:
        """Entries that came in."""
        before = mask.positions.clone()
        without_data = mask.score in WITHOUT_DATA
        scores = mask.own_scores(draw=self._step) if without_data else module.mask_scores(mask)
        mask.set_scores(scores, keep_dropped=self.dropped == "keep")
        old, new = common_entries(before, mask.positions)
        for optimizer in trainer.optimizers:
            carry_state(optimizer, mask.values, old, new)
        return len(before) - len(new)


def masks_of(module: pl.LightningModule) -> list[SparseMask]:
    """The sparse masks that train."""
    if not isinstance(module, AdaptedModule):
        return []
    live = module.bank.adapters_of(module.bank.live).values()
    return [adapter for adapter in live if isinstance(adapter, SparseMask)]


@torch.no_grad()
def carry_state(optimizer: Optimizer, values: Tensor, old: Tensor, new: Tensor) -> None:
    """Move what an optimizer keeps for the entries ``old`` of a vector to its entries ``new``, and clear all others."""
    for state in optimizer.state.get(values, {}).values():
        if isinstance(state, Tensor) and state.shape == values.shape:
            before = whole(state)
            after = torch.zeros_like(before)
            after[new] = before[old]
            write(state, after)
