"""One frozen adapter set for each stage of a stream, and routers that learn which stage a sample resembles.

Legend: B samples, T stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fulgurite.methods.routing.base import Router
from fulgurite.modules.adapted import INITIAL, AdaptedModule
from fulgurite.samples import Stage, batches_within


class StageSets(AdaptedModule):
    """What modules with a set per stage share, whatever their task.

    Attributes:
        start_from: a new stage starts from the previous stage's adapters, or from those before any stage.
    """

    start_from: Literal["previous", "initial"] = "previous"

    def set_names(self, stages: Sequence[Stage]) -> list[str]:
        """``initial``, and one set per stage. Raises ValueError where two would have one name."""
        names = [INITIAL, *(s.name for s in stages)]
        if len(set(names)) < len(names) or "live" in names:
            raise ValueError(f"stage names must differ and not be initial or live; got {names[1:]}")
        return names

    def begin_stage(self) -> None:
        """Start from the previous stage's values, which the live set has, or from those before any stage."""
        if self.start_from == INITIAL:
            self.bank.copy(INITIAL, "live")

    def first_epoch(self, stage: int) -> int:
        """Global epoch in which ``stage`` begins."""
        return sum(s.epochs for s in self.stages[:stage])

    @property
    def in_first_epoch(self) -> bool:
        """Whether the current epoch is the first one of its stage, in which routers learn."""
        return self.trainer.current_epoch == self.first_epoch(self.stage)

    def on_train_epoch_start(self) -> None:
        """As in the base; say where a limit keeps part of a stage's data from the routers."""
        super().on_train_epoch_start()
        stage = self.stages[self.stage]
        seen = batches_within(stage.num_batches, self.trainer.limit_train_batches)
        if seen < stage.num_batches and self.in_first_epoch:
            rank_zero_info(
                f"{stage.name}: the router learns from {seen} of {stage.num_batches} batches "
                f"(limit_train_batches {self.trainer.limit_train_batches})"
            )

    def teach(self, routers: Sequence[Router], parts: Sequence[Tensor], counted: Tensor) -> None:
        """Features of all processes' samples that count, (B, D_i) each, into the current stage's expert."""
        gathered = [self.all_gather(p).flatten(0, -2) for p in (*parts, counted.unsqueeze(-1))]
        features = tuple(p[gathered[-1].flatten()] for p in gathered[:-1])
        for router in routers:
            router.update(features, self.stages[self.stage].name)

    def columns(self, current: str = "live") -> list[str]:
        """Adapter sets in the order of mixing weights; the current stage's values are in the set ``current``."""
        names = [INITIAL, *(s.name for s in self.stages)]
        if self.stage >= 0:
            names[self.stage + 1] = current
        return names

    def named_weights(self, weights: Sequence[float]) -> dict[str, float]:
        """Mixing weights above zero by adapter set."""
        names = [INITIAL, *(s.name for s in self.stages)]
        return {n: round(w, 6) for n, w in zip(names, weights) if w > 0}

    def own_stages(self, numbers: Sequence[int | None], domains: Tensor) -> Tensor:
        """(B,) the stage (1..T) that trains each sample's domain, 0 where none does.

        Args:
            numbers: the stage of every domain.
            domains: (B,) index of each sample's domain; -1 for an unknown one.
        """
        own = torch.tensor([*(number or 0 for number in numbers), 0], device=self.device)
        return own[domains]
