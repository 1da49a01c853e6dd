"""Video question answering with adapters beside a frozen backbone.

Legend: B batch, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import LambdaLR

from fulgurite.backbones.base import QAOutput, VideoQABackbone
from fulgurite.checkpoints import Manifest, MismatchError
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.losses import answer_loss
from fulgurite.methods.schedules import Schedule, StagedSchedule, WarmupLinear
from fulgurite.metrics.continual_accuracy import ContinualAccuracy
from fulgurite.metrics.vqa_accuracy import answer_credit
from fulgurite.modules.facts import (
    check_epochs,
    describe_difference,
    evaluated_facts,
    read_facts,
    require_same_tensors,
    stage_names,
    unknown_answers,
)
from fulgurite.modules.optimization import ParamGroup, grouped, steps_of_stages
from fulgurite.reports.page import Section
from fulgurite.reports.video_qa import sections_of_plain
from fulgurite.samples import Batch, Collator, DataError, DataInfo, Sample, Stage, stage_of

INITIAL = "initial"


class VideoQA(pl.LightningModule):
    """One adapter set trained on whatever the DataModule gives; the plain form of the task.

    With a continual DataModule this is sequential fine-tuning, with a joint one it is multitask training.

    Args:
        backbone: frozen video-language model.
        adapters: what trains, and where.
        optimizer: builds the optimizer from parameter groups.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate; the rest uses the optimizer's.
    """

    saved_parts: tuple[str, ...] = ("bank",)

    def __init__(
        self,
        backbone: VideoQABackbone,
        adapters: list[Placement],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.bank = AdapterBank(backbone, adapters)
        self.optimizer, self.schedule = optimizer, schedule or WarmupLinear()
        self.param_groups = param_groups or []
        self.info: DataInfo | None = None
        self.data_info: DataInfo | None = None
        self.stages: tuple[Stage, ...] = ()
        self.stage = -1

    def collator(self, stage: str) -> Collator:
        """The backbone's collator; usable without a trainer."""
        return self.backbone.collator(stage)

    def feature_extractor(self) -> Any:
        """What a feature cache computes for this module; None where it needs none."""
        return self.backbone.feature_extractor()

    def set_names(self, stages: Sequence[Stage]) -> list[str]:
        """Names of the adapter sets beside the live one, in column order."""
        return [INITIAL]

    def prepare(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Build everything whose shape depends on the data. The same call again does nothing.

        Raises:
            MismatchError: the module is already built for other data.
        """
        if self.info is not None:
            if (info, stage_names(stages)) != (self.info, stage_names(self.stages)):
                raise MismatchError(describe_difference(self.info, info, self.stages, stages))
            self.stages = tuple(stages)
            return
        for name in self.set_names(stages):
            if name not in self.bank.names:
                self.bank.add(name)
        self.load_initial()
        self.backbone.set_answers(info.answers)
        self.info, self.stages = info, tuple(stages)
        self.base_digest = self.backbone.fingerprint  # before a strategy shards or casts the weights
        self.answer_index = {answer: i for i, answer in enumerate(info.answers)}
        # R[t, i] on the validation split; part of every checkpoint, since a resumed run does not measure it again.
        nothing = torch.full((len(stages) + 1, len(info.domains)), math.nan, dtype=torch.float64)
        self.register_buffer("val_matrix", nothing.to(self.device))

    def load_initial(self) -> None:
        """Give ``initial`` and the live set the same start, the backbone's own adapters where it brings some."""
        own = self.backbone.initial_adapters()
        if own is not None:
            self.bank.load_sites("live", own)
        self.bank.copy("live", INITIAL)

    def initial_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a new run takes from a checkpoint's tensors: its live set, as the start of this run's sets."""
        live = {n: t for n, t in tensors.items() if n.startswith("bank.sets.live.")}
        return {**live, **{n.replace(".live.", f".{INITIAL}.", 1): t for n, t in live.items()}}

    def setup(self, stage: str) -> None:
        """Build from the DataModule's facts; a checkpoint's own facts win when one is loaded later.

        Questions without a vocabulary, as `predict` may have, leave all to the checkpoint.
        """
        datamodule = self.trainer.datamodule
        self.data_info = datamodule.info()
        if stage == "fit" or (self.info is None and self.data_info.answers):
            self.prepare(self.data_info, datamodule.stages())

    def configure_model(self) -> None:
        """Shard blocks and root under FSDP2; nothing elsewhere."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        self.backbone.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
        for tower in self.backbone.spec.towers:
            for name in self.backbone.spec.block_names(self.backbone, tower.name):
                fully_shard(self.backbone.get_submodule(name), mesh=mesh)
        fully_shard(self, mesh=mesh)

    def reshard(self) -> None:
        """Bring every FSDP2 unit back to its sharded form, to read and write values in place."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def evaluated(self) -> DataInfo:
        """Domains and kinds of the present data, the columns of its results; those of a fit are the module's own."""
        assert self.info is not None
        return self.info if self.data_info is None else evaluated_facts(self.info, self.data_info)

    def begin_evaluation(self, split: str) -> None:
        """Say how many questions of ``split`` ask for an answer that the module cannot give.

        Raises:
            DataError: neither the data nor a checkpoint says what the answers are.
        """
        if self.info is None:
            raise DataError(
                f"{type(self.trainer.datamodule).__name__} has no answers to choose from: give the checkpoint of a "
                "trained run as --ckpt_path, or set the DataModule's vocabulary"
            )
        if self.trainer.sanity_checking or not hasattr(self.trainer.datamodule, "samples"):
            return
        samples = self.trainer.datamodule.samples(split)
        count = unknown_answers(samples, self.answer_index)
        if count:
            rank_zero_info(
                f"{count} of {len(samples)} {split} questions have no answer among the {len(self.info.answers)} that "
                "this model knows; they count as wrong"
            )

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Answer scores (B, A), domain columns (B,) and question types (B,), -1 where the data has none known."""
        assert self.info is not None
        domains = {name: i for i, name in enumerate(self.evaluated.domains)}
        kinds = {name: i for i, name in enumerate(self.evaluated.kinds)}
        scores = torch.zeros(len(batch["id"]), len(self.info.answers))
        for row, answers in enumerate(batch["answers"]):
            for answer, score in answers.items():
                if answer in self.answer_index:
                    scores[row, self.answer_index[answer]] = score
        columns = torch.tensor([domains.get(d, -1) for d in batch["domain"]])
        types = torch.tensor([kinds.get(k, -1) for k in batch["kind"]])
        return scores.to(self.device), columns.to(self.device), types.to(self.device)

    def forward(self, batch: Batch, selection: Any = "live", sets: Sequence[str] | None = None) -> QAOutput:
        """Answer with one adapter set, or with a mixture per sample; see `AdapterBank.use`."""
        with self.bank.use(selection, sets):
            return self.backbone(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the counted samples of the global batch, whatever the number of ranks."""
        scores, _, _ = self.targets(batch)
        losses = answer_loss(self(batch).logits, scores)
        counted = batch["counted"]
        total = self.trainer.strategy.reduce(counted.sum().float(), reduce_op="sum").clamp(min=1)
        loss = (losses * counted).sum() * self.trainer.world_size / total
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        """A resume in the middle of an epoch skips its start."""
        self.enter_stage()

    def on_train_epoch_start(self) -> None:
        """Stages begin at epoch starts."""
        self.enter_stage()

    def enter_stage(self) -> None:
        """Fresh optimizer state when a stage begins. Idempotent."""
        stage = stage_of(self.stages, self.trainer.current_epoch)
        if stage == self.stage:
            return
        if self.stage >= 0:
            self.reshard()
            self.begin_stage()
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()
        self.stage = stage

    def begin_stage(self) -> None:
        """What happens to the live set between two stages: here it simply goes on."""

    def on_fit_start(self) -> None:
        """Epochs beyond the last stage do not exist."""
        total, asked = sum(s.epochs for s in self.stages), self.trainer.max_epochs
        if asked is None or asked < 0 or asked > total:
            self.trainer.fit_loop.max_epochs = total

    def configure_optimizers(self) -> Any:
        """The live set alone, with one schedule over the global step restarted at every stage."""
        named = dict(self.bank.sets["live"].named_parameters())
        optimizer = self.optimizer(grouped(named, self.param_groups))
        staged = StagedSchedule(self.schedule, steps_of_stages(self.stages, self.trainer))
        # A function is left out of checkpoints, an object is not.
        scheduler = LambdaLR(optimizer, lambda step: staged(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_start(self) -> None:
        """Each validation counts anew."""
        if not self.val_rows_kept:
            self.begin_evaluation("val")
        shape = len(self.evaluated.domains), 0, len(self.evaluated.kinds)
        self.val_accuracy = ContinualAccuracy(*shape).to(self.device)

    @property
    def val_rows_kept(self) -> bool:
        """Whether validation results belong to the run: within a fit, beyond its sanity check."""
        return self.trainer.state.fn == "fit" and not self.trainer.sanity_checking

    def evaluation_logits(self, batch: Batch) -> Tensor:
        """(B, A) scores with which validation judges the model."""
        return self(batch).logits

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch."""
        self.count(self.val_accuracy, batch, self.evaluation_logits(batch))

    def count(self, metric: ContinualAccuracy, batch: Batch, logits: Tensor) -> None:
        """Add the counted samples of a batch whose domain the module knows."""
        scores, domains, kinds = self.targets(batch)
        use = batch["counted"] & (domains >= 0)
        metric.update(0, domains[use], answer_credit(logits[use], scores[use]), kinds[use])

    def on_validation_epoch_end(self) -> None:
        """Keep the row; log ``val/accuracy`` over the domains that were validated, and one value per domain."""
        row = self.val_accuracy.results()["matrix"][0]
        if self.val_rows_kept:
            self.val_matrix[self.stage + 1] = row
        self.log_row("val", row)

    def log_row(self, prefix: str, row: Tensor) -> None:
        """Log (N,) accuracies; every rank calls it."""
        seen = ~row.isnan()
        if self.trainer.sanity_checking or not seen.any():
            return
        self.log(f"{prefix}/accuracy", row[seen].mean().float(), prog_bar=True)
        for name, value in zip(self.evaluated.domains, row):
            if not value.isnan():
                self.log(f"{prefix}/accuracy/{name}", value.float())

    def on_test_start(self) -> None:
        """A fresh count for every test."""
        self.begin_evaluation("test")
        shape = len(self.evaluated.domains), 0, len(self.evaluated.kinds)
        self.test_accuracy = ContinualAccuracy(*shape).to(self.device)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch."""
        self.count(self.test_accuracy, batch, self.evaluation_logits(batch))

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy`` and one value per domain."""
        row = self.test_accuracy.results()["matrix"][0]
        self.test_row = {n: v for n, v in zip(self.evaluated.domains, row.tolist()) if v == v}
        self.log_row("test", row)

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """What the report shows of the last test."""
        return sections_of_plain(self.test_row, samples)

    def on_predict_start(self) -> None:
        """The answers must be known by now."""
        if self.info is None:
            self.begin_evaluation("predict")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answers with probabilities for every counted sample."""
        return self.answer_rows(batch, self.evaluation_logits(batch))

    def answer_rows(self, batch: Batch, logits: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """One JSON-able row per counted sample: id, answer, probability, the best ``top`` with probabilities."""
        assert self.info is not None
        values, index = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
        rows = []
        for b in batch["counted"].nonzero().flatten().tolist():
            best = [
                {"answer": self.info.answers[i], "probability": round(p, 6)}
                for i, p in zip(index[b].tolist(), values[b].tolist())
            ]
            rows.append({"id": batch["id"][b], **best[0], "top": best})
        return rows

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The delta alone: adapter sets, router, validation matrix. The frozen backbone is never in it."""
        self.reshard()
        out: dict[str, Any] = {}
        for part in self.saved_parts:
            module = getattr(self, part, None)
            if module is not None:
                module.state_dict(destination=out, prefix=f"{prefix}{part}.", keep_vars=keep_vars)
        if self.info is not None:
            out[f"{prefix}val_matrix"] = self.val_matrix if keep_vars else self.val_matrix.detach()
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Where ``strict``, over everything that the delta holds; one error lists all differences.

        Raises:
            MismatchError: a tensor is missing, unknown, or of another shape.
        """
        if strict:
            require_same_tensors(self.state_dict(), state_dict)
        return super().load_state_dict(dict(state_dict), strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the delta stands on: backbone digest, data facts, stage."""
        assert self.info is not None
        checkpoint["fulgurite"] = {
            **checkpoint.get("fulgurite", {}),
            "kind": "delta",
            "base": {"source": type(self.backbone).__name__, "digest": self.base_digest},
            "info": asdict(self.info),
            "info_digest": self.info.digest,
            "stages": [asdict(s) for s in self.stages],
            "stage": self.stage,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build for the checkpoint's data and refuse another backbone.

        Raises:
            MismatchError: other vocabulary, domains or backbone than the checkpoint's.
        """
        facts = checkpoint["fulgurite"]
        info, stages = read_facts(facts)
        if self.trainer.state.fn == "fit":
            check_epochs(stages, self.stages, facts["stage"])
        elif info != self.info:
            self.forget()
        self.restore(facts)
        Manifest(kind="delta", base=facts["base"]).require_base(self.base_digest, "the checkpoint")

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Build for the data that a checkpoint's facts describe, at its stage; the tensors come after this.

        Raises:
            MismatchError: the module is already built for other data.
        """
        info, stages = read_facts(facts)
        own = self.stages if self.info is not None else stages
        self.prepare(info, stages)
        self.stages = own
        self.stage = facts["stage"]

    def forget(self) -> None:
        """Drop what was built for other data, so that a checkpoint's own facts can be used instead."""
        if isinstance(self, FSDPModule):
            raise MismatchError(
                "this DataModule has other answers or domains than the checkpoint: evaluate on it in one process "
                "or under ddp, where the model can be rebuilt"
            )
        for name in self.set_names(self.stages):
            if name != INITIAL and name in self.bank.names:
                self.bank.remove(name)
        self.info = None
