"""Pruned weights stay at zero while the others train, and may be pruned little by little."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fulgurite.callbacks.finite import local
from fulgurite.methods.pruning.gradual import cubic_sparsity, grown_mask
from fulgurite.methods.quantization.storage import packed_mask, unpacked_mask
from fulgurite.methods.sharding import reshard
from fulgurite.modules.sharding import distribute


@dataclass
class GradualPruning:
    """When how much is pruned, by magnitude within each tensor (arXiv 1710.01878).

    Args:
        sparsity: in the end.
        end: optimizer step after which it is reached.
        start: optimizer step after which pruning begins.
        every: optimizer steps between two times; the last one is at ``end``.
        initial: share that is pruned at ``start``.
    """

    sparsity: float
    end: int
    start: int = 0
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.sparsity <= 1:
            raise ValueError(
                f"gradual: initial={self.initial}, sparsity={self.sparsity}: expected 0 <= initial <= sparsity <= 1"
            )
        if not 0 <= self.start < self.end or self.every < 1:
            raise ValueError(
                f"gradual: start={self.start}, end={self.end}, every={self.every}: expected 0 <= start < end, every > 0"
            )

    def due(self, step: int) -> float | None:
        """Share that is pruned after ``step`` optimizer steps, where it is time."""
        if not self.start <= step <= self.end or ((step - self.start) % self.every and step != self.end):
            return None
        return cubic_sparsity(step, self.start, self.end, self.sparsity, self.initial)


class KeepMasks(pl.Callback):
    """Keeps pruned entries of trained tensors at exactly 0.

    Without ``gradual``, the entries that are 0 when training begins, as those of a pruned checkpoint given by
    ``--init_from``; a tensor that is 0 throughout, as a fresh head, was not pruned and is left alone. With it, entries
    go while the model trains; ``train/sparsity`` is logged.

    Hooks: masks are made in ``on_train_start``, and grow in ``on_train_batch_end``, before a checkpoint of that step is
        written. Gradients are masked in ``on_before_optimizer_step``, before they are clipped; the optimizer's state is
        masked whenever masks grow; weights are masked after every step of an optimizer.
    Stored: the masks, a bit per entry. A resumed run goes on with them.
    Ranks: all have the same masks, under FSDP2 each its slices; masks grow by whole tensors, gathered one at a time.

    Args:
        parameters: full pattern of names of parameters; all trained ones of two axes or more where null.
        gradual: prune by a schedule.
    """

    def __init__(self, parameters: str | None = None, gradual: GradualPruning | None = None) -> None:
        self.parameters, self.gradual = parameters, gradual
        self._bits: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._restored = False
        self._step = -1

    @property
    def state_key(self) -> str:
        """Of these parameters, beside others in the same trainer."""
        return self._generate_state_key(parameters=self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The masks, packed, by name of the parameter."""
        return {"masks": dict(self._bits)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with these masks."""
        self._bits, self._restored = dict(state_dict["masks"]), True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._bits, self._masks, self._restored, self._step = {}, {}, False, -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the tensors and make the first masks, or take those of the checkpoint.

        Raises:
            MisconfigurationException: no trained tensor has the name, or none was pruned.
        """
        reshard(pl_module)
        self._targets = self._chosen(pl_module)
        self._step = trainer.global_step
        if self._restored:
            for name, bits in self._bits.items():
                self._take(name, unpacked_mask(bits, tuple(self._targets[name].shape)))
        elif self.gradual is None:
            self._zeros()
        elif (sparsity := self.gradual.due(self._step)) is not None:
            self._grow(sparsity)
        self._apply(trainer.optimizers)
        self._hooks = [each.register_step_post_hook(lambda *_: self._mask_weights()) for each in trainer.optimizers]

    def _chosen(self, module: pl.LightningModule) -> dict[str, Tensor]:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if self.parameters is None:
            found = {name: p for name, p in trained.items() if p.dim() > 1}
        else:
            found = {name: p for name, p in trained.items() if re.fullmatch(self.parameters, name)}
        if not found:
            raise MisconfigurationException(
                f"KeepMasks: parameters={self.parameters!r} is the name of none of {len(trained)} trained tensors, as "
                f"{next(iter(trained), None)}"
            )
        return found

    def _zeros(self) -> None:
        """Masks of the entries that are 0."""
        for name, parameter in self._targets.items():
            kept = whole(parameter) != 0
            if kept.any() and not kept.all():
                self._take(name, kept)
        if not self._masks:
            raise MisconfigurationException(
                f"KeepMasks: none of {len(self._targets)} trained tensors has entries that are 0 beside others: start "
                "from a pruned checkpoint (--init_from), or set gradual"
            )
        pruned = sum(int((~mask).sum()) for mask in self._masks.values())
        rank_zero_info(f"KeepMasks: {pruned} entries of {len(self._masks)} tensors stay 0 (on this rank)")

    def _grow(self, sparsity: float) -> None:
        """Prune every tensor up to ``sparsity``. Under FSDP2 a collective."""
        for name, parameter in self._targets.items():
            before = self._bits.get(name)
            weight = whole(parameter).detach()
            mask = None if before is None else unpacked_mask(before, tuple(weight.shape)).to(weight.device)
            self._take(name, grown_mask(weight, mask, sparsity))

    def _take(self, name: str, mask: Tensor) -> None:
        """Have a mask, whole."""
        target = self._targets[name]
        self._bits[name] = packed_mask(mask).cpu()
        self._masks[name] = local(distribute(mask.to(target.device), target, name))

    @torch.no_grad()
    def _apply(self, optimizers: list[Optimizer]) -> None:
        """Mask weights and the state of their optimizers."""
        self._mask_weights()
        for optimizer in optimizers:
            for name, mask in self._masks.items():
                for value in optimizer.state.get(self._targets[name], {}).values():
                    if isinstance(value, Tensor) and local(value).shape == mask.shape:
                        local(value).mul_(mask)

    @torch.no_grad()
    def _mask_weights(self) -> None:
        for name, mask in self._masks.items():
            local(self._targets[name].data).masked_fill_(~mask, 0)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """What is pruned has no gradient."""
        for name, mask in self._masks.items():
            gradient = self._targets[name].grad
            if gradient is not None:
                local(gradient).masked_fill_(~mask, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune more, where it is time."""
        if self.gradual is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if (sparsity := self.gradual.due(self._step)) is not None:
            reshard(pl_module)
            self._grow(sparsity)
            self._apply(trainer.optimizers)
            pl_module.log("train/sparsity", sparsity)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._targets = [], {}


def whole(parameter: Tensor) -> Tensor:
    """The whole tensor; of a sharded one a collective."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
