"""One edit that deletes all items of a data set together, or one batch after the other, by a fit.

Losses are sums of all ranks by counts of all ranks. What is compared with is the model without its edit; no second
model is held.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.ranks import Ranks
from fulgurite.methods.unlearning.attacks.base import Attack, WhiteBox
from fulgurite.methods.unlearning.objectives.base import Terms, View, answer_nll
from fulgurite.methods.unlearning.objectives.retain import RetainTerm
from fulgurite.metrics.unlearning import AttackSuccess
from fulgurite.modules.edited_state import EditedState
from fulgurite.modules.extraction import read_out
from fulgurite.modules.item_editing import Asked, objective_views, retain_view
from fulgurite.modules.item_questions import ItemQuestions
from fulgurite.modules.unlearning_summary import key_of
from fulgurite.samples import Batch, Sample

DELETED = {"success_before": "success_then", "success": "success_now"}  # after an item's own steps, and after all


class JointDeletion(ItemQuestions):
    """The fit of one edit; see `ItemQuestions`.

    Attributes:
        retain: what keeps other answers; None keeps nothing.
        forget_weight: of the objective.
        retain_weight: of the retain term.
        attacks: of which those that read hidden states tell what comes back.
        deleted: by item, what they found after its own steps, while items are deleted one batch after the other.
        nll_before: by item, (targets, rows) losses of the model before the edit.
    """

    retain: RetainTerm | None
    forget_weight: float
    retain_weight: float
    attacks: Sequence[Attack]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.deleted: dict[str, dict[str, float]] = {}
        self.nll_before: dict[tuple[str, str], Tensor] = {}

    @property
    def white_box(self) -> list[WhiteBox]:
        """The attacks that read hidden states."""
        return [attack for attack in self.attacks if isinstance(attack, WhiteBox)]

    def on_fit_start(self) -> None:
        """As in the base. Where an objective compares probabilities of answers alone with those before the edit, one
        pass over all items serves the whole fit; it is the same pass in a resumed one.

        Raises:
            ValueError: gradients are accumulated, whose mean weighs short batches more.
        """
        super().on_fit_start()
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "losses are sums by counts of a batch, so accumulate_grad_batches would weigh batches and not answers: "
                "leave it at 1 and raise data.batch_size"
            )
        self.nll_before = {}
        if not self.objective.keeps_nll:
            return
        for start in range(0, len(self.pool), self.rows_per_pass):
            samples = self.pool[start : start + self.rows_per_pass]
            forget = self.forgotten(samples)
            with self.trainer.precision_plugin.forward_context(), torch.no_grad(), self.bank.use(None):
                views = objective_views(self, self.objective, forget)
            found = torch.stack([answer_nll(view) for view in views])
            for number, sample in enumerate(samples):
                self.nll_before[sample.domain, sample.id] = found[:, forget.items == number]

    def reference_views(self, samples: Sequence[Sample], forget: Asked) -> list[View | None]:
        """The model before the edit on the rows of the objective, or what is kept of it."""
        if self.objective.keeps_nll:
            known = torch.cat([self.nll_before[sample.domain, sample.id] for sample in samples], dim=1)
            return [View(None, labels, nll=nll) for labels, nll in zip(forget.labels, known)]
        if not self.objective.needs_reference:
            return [None] * len(forget.labels)
        with torch.no_grad(), self.bank.use(None):
            return list(objective_views(self, self.objective, forget))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the global batch, whatever the number of processes."""
        samples = batch["items"].samples
        forget = self.forgotten(samples)
        references = self.reference_views(samples, forget)
        terms = self.objective(objective_views(self, self.objective, forget), references)
        loss = self.forget_weight * self.mean_over_ranks(terms, batch["counted"][forget.items], "forget")
        if self.retain is not None:
            place = f"{self.trainer.current_epoch}"
            kept = self.kept([self.drawn_of(sample, 1, f"retain {place}", self.retained) for sample in samples])
            reference = None
            if self.retain.needs_reference:
                with torch.no_grad(), self.bank.use(None):
                    reference = retain_view(self, self.retain, kept)
            stays = self.retain(retain_view(self, self.retain, kept), reference)
            loss = loss + self.retain_weight * self.mean_over_ranks(stays, batch["counted"][kept.items], "retain")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(samples), sync_dist=True)
        return loss

    def mean_over_ranks(self, terms: Terms, counted: Tensor, name: str) -> Tensor:
        """Totals by counts of all ranks' rows, times their number, as the mean of gradients asks for."""
        counted = counted.to(terms.counts.device)
        counts = self.trainer.strategy.reduce((terms.counts * counted).sum(), reduce_op="sum")
        loss = (terms.totals * counted).sum() / counts.clamp(min=1) * self.trainer.world_size
        self.log(f"train/{name}", loss.detach(), batch_size=len(counted), sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As in the base; then the edit goes back to where it may be, before anything is saved."""
        super().optimizer_step(*args, **kwargs)
        for edit in self.bank.adapters_of("live").values():
            edit.project()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Items that are deleted one batch after the other are attacked when theirs has had its last step."""
        repeats = getattr(self.trainer.datamodule, "repeats", 1)
        if repeats > 1 and (batch_idx + 1) % repeats == 0 and self.white_box:
            samples, own = batch["items"].samples, {}
            shares = self.read_out_now(samples)
            for number, (sample, counts) in enumerate(zip(samples, batch["counted"].tolist())):
                if counts:
                    own[name_of(sample)] = {title: found[number] for title, found in shares.items()}
            for found in Ranks(self.trainer.global_rank, self.trainer.world_size).gather(own):
                self.deleted |= found

    def on_train_epoch_end(self) -> None:
        """As in the base; items deleted one batch after the other are attacked once more, to see what came back."""
        super().on_train_epoch_end()
        if not self.deleted:
            return
        white = self.white_box
        success = AttackSuccess({key_of(attack): attack.budget for attack in white}).to(self.device)
        pool = [sample for sample in self.pool if name_of(sample) in self.deleted]
        rank, world = self.trainer.global_rank, self.trainer.world_size
        pool += pool[: -len(pool) % world]  # as many for every process; one that is attacked twice counts once
        for start in range(0, len(pool), self.rows_per_pass * world):
            samples = pool[start : start + self.rows_per_pass * world][rank::world]
            now, ids = self.read_out_now(samples), [name_of(sample) for sample in samples]
            for attack in white:
                then = torch.tensor([self.deleted[name][attack.title] for name in ids], dtype=torch.float64)
                after = torch.tensor(now[attack.title], dtype=torch.float64)
                success.update(ids, key_of(attack), after=after, before=then)
        for name, value in success.compute().items():
            kind, _, rest = name.partition("/")
            if kind in DELETED and "/" not in rest:
                self.log(f"deleted/{DELETED[kind]}/{rest}", value.float(), sync_dist=False)
        self.deleted = {}

    def read_out_now(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """What white-box attacks find at present, by title."""
        white = {attack.title: attack for attack in self.white_box}
        was_training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            found = read_out(self, white, samples, EditedState(self.bank, self.site, live=True))
        self.train(was_training)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in the base, with what was found of the items deleted so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fulgurite"]["deleted"] = self.deleted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in the base."""
        super().on_load_checkpoint(checkpoint)
        self.deleted = dict(checkpoint["fulgurite"]["deleted"])


def name_of(sample: Sample) -> str:
    """By which an item is known among those of all data sets."""
    return f"{sample.domain}/{sample.id}"
