"""Video question answering with adapters beside a frozen backbone.

Legend: B batch, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fulgurite.backbones.base import QAOutput, VideoQABackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.losses import answer_loss
from fulgurite.methods.schedules import Schedule
from fulgurite.methods.structure import ModelSpec
from fulgurite.metrics.answer_counts import AnswerCounts, mean_of_known
from fulgurite.metrics.targets import Targets, targets_of
from fulgurite.metrics.vqa_accuracy import best_answers
from fulgurite.modules.adapted import BACKBONE_DIGEST, INITIAL, AdaptedModule
from fulgurite.modules.facts import evaluated_facts, unknown_answers
from fulgurite.modules.optimization import ParamGroup
from fulgurite.reports.page import Section
from fulgurite.reports.video_qa import sections_of_plain
from fulgurite.samples import Batch, DataError, DataInfo, Sample, Stage


class VideoQA(AdaptedModule):
    """One adapter set trained on whatever the DataModule gives; the plain form of the task.

    With a continual DataModule this is sequential fine-tuning, with a joint one it is multitask training.

    Args:
        backbone: frozen video-language model.
        adapters: what trains, and where.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate; the rest uses the optimizer's.
    """

    saved_buffers = ("val_matrix",)
    compressible_part = "backbone"

    def __init__(
        self,
        backbone: VideoQABackbone,
        adapters: list[Placement],
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        if not adapters:
            raise ValueError("model.init_args.adapters is empty, so nothing would train: give at least one placement")
        super().__init__(backbone, adapters, optimizer, schedule, param_groups)

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Answers, and the accuracies R[t, i] on the validation split, which a resumed run does not measure again."""
        self.backbone.set_answers(info.answers)
        self.answer_index = {answer: i for i, answer in enumerate(info.answers)}
        nothing = torch.full((len(stages) + 1, len(info.domains)), math.nan, dtype=torch.float64)
        self.register_buffer("val_matrix", nothing.to(self.device))

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

    def targets(self, batch: Batch) -> Targets:
        """What the answers of a batch are judged by."""
        return targets_of(batch, self.evaluated, self.answer_index, self.device)

    def forward(self, batch: Batch, selection: Any = "live", sets: Sequence[str] | None = None) -> QAOutput:
        """Answer with one adapter set, or with a mixture per sample; see `AdapterBank.use`."""
        with self.bank.use(selection, sets):
            return self.backbone(batch)

    def calibration_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All tensors of the batch but who counts; see `Calibrated`."""
        return {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "counted"}

    def answer_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, A) scores with the adapters that are active."""
        return self.backbone(inputs).logits

    def answer_targets(self, batch: Batch) -> Tensor:
        """(B, A) scores of the right answers; see `Compressible`."""
        return self.targets(batch).scores

    def blocks_spec(self) -> ModelSpec:
        """The backbone's; see `Compressible`."""
        return self.backbone.spec

    def pass_blocks(self, inputs: dict[str, Tensor]) -> None:
        """Through the backbone, with the adapters that are active."""
        self.backbone.pass_blocks(inputs)

    def weights_changed(self) -> dict[str, Any]:
        """The backbone and what is derived from it become part of the checkpoint."""
        self.self_contained = True
        with self.bank.use(None):
            self.backbone.refresh()
        return {BACKBONE_DIGEST: self.backbone.fingerprint}

    def token_masks(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the backbone."""
        return {rf"backbone\.{pattern}": mask for pattern, mask in self.backbone.token_masks(inputs).items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the counted samples of the global batch, whatever the number of ranks."""
        losses = answer_loss(self(batch).logits, self.targets(batch).scores)
        counted = batch["counted"]
        total = self.trainer.strategy.reduce(counted.sum().float(), reduce_op="sum").clamp(min=1)
        loss = (losses * counted).sum() * self.trainer.world_size / total
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        return loss

    def new_counts(self, num_stages: int = 0) -> AnswerCounts:
        """Empty counts with a column for every domain of the present data."""
        shape = len(self.evaluated.domains), num_stages, len(self.evaluated.kinds)
        return AnswerCounts(*shape).to(self.device)

    def on_validation_start(self) -> None:
        """Each validation counts anew."""
        if not self.val_rows_kept:
            self.begin_evaluation("val")
        self.val_counts: dict[str, AnswerCounts] = {}

    @property
    def val_rows_kept(self) -> bool:
        """Whether validation results belong to the run: within a fit, beyond its sanity check."""
        return self.trainer.state.fn == "fit" and not self.trainer.sanity_checking

    def evaluation_logits(self, batch: Batch) -> Tensor:
        """(B, A) scores with which validation judges the model."""
        return self(batch).logits

    def validation_logits(self, batch: Batch) -> dict[str, Tensor]:
        """(B, A) scores by what they measure: ``now``, and in the first full validation of a run its ``start``."""
        logits = {"now": self.evaluation_logits(batch)}
        if self.val_rows_kept and self.stage == 0 and self.ends_stage:
            logits["start"] = self(batch, INITIAL).logits
        return logits

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch."""
        targets = self.targets(batch)
        for name, logits in self.validation_logits(batch).items():
            self.val_counts.setdefault(name, self.new_counts()).update(0, logits, targets)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` over the domains that were validated, and one value per domain; keep the row."""
        rows = {name: counts.accuracy.results()["matrix"][0] for name, counts in self.val_counts.items()}
        row = self.kept_row(rows)
        if self.val_rows_kept:
            self.val_matrix[self.stage + 1] = row
            if "start" in rows:
                self.val_matrix[0] = rows["start"]
        self.log_row("val", row)

    def kept_row(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The (N,) accuracies that this validation stands for."""
        return rows["now"]

    def log_row(self, prefix: str, row: Tensor) -> None:
        """Log (N,) accuracies; every rank calls it."""
        seen = ~row.isnan()
        if self.trainer.sanity_checking or not seen.any():
            return
        self.log(f"{prefix}/accuracy", mean_of_known(row), prog_bar=True)
        for name, value in zip(self.evaluated.domains, row.tolist()):
            if value == value:
                self.log(f"{prefix}/accuracy/{name}", value)

    def log_details(self, results: Mapping[str, Tensor]) -> None:
        """Log ``test/top10``, ``test/speech`` and ``test/kind/<domain>/<kind>``, where there are such questions."""
        for name in ("top10", "speech"):
            mean = mean_of_known(results[name])
            if mean == mean:
                self.log(f"test/{name}", mean)
        for domain, row in zip(self.evaluated.domains, results["by_kind"].tolist()):
            for kind, value in zip(self.evaluated.kinds, row):
                if value == value:
                    self.log(f"test/kind/{domain}/{kind}", value)

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """``accuracy`` and ``accuracy/<domain>`` of the present weights, as validation counts them; see `Scored`."""
        counts = self.new_counts()
        for batch in batches:
            counts.update(0, self.evaluation_logits(batch), self.targets(batch))
        row = counts.accuracy.results()["matrix"][0]
        domains = {f"accuracy/{name}": value for name, value in zip(self.evaluated.domains, row.tolist())}
        return {"accuracy": mean_of_known(row), **{name: value for name, value in domains.items() if value == value}}

    def on_test_start(self) -> None:
        """Fresh counts and answers for every test."""
        self.begin_evaluation("test")
        self.test_counts = self.new_counts()
        self.test_answers: list[dict[str, Any]] = []

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch."""
        logits = self.evaluation_logits(batch)
        self.test_counts.update(0, logits, self.targets(batch))
        self.keep_answers(batch, {"last": logits})

    def keep_answers(self, batch: Batch, logits: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Keep, per counted sample, what each mode answers; returns the new rows."""
        assert self.info is not None
        best = {mode: best_answers(each, 1)[:, 0].tolist() for mode, each in logits.items()}
        rows = [
            {
                "id": batch["id"][b],
                "domain": batch["domain"][b],
                "kind": batch["kind"][b],
                "gold": batch["answers"][b],
                "answers": {mode: self.info.answers[index[b]] for mode, index in best.items()},
            }
            for b in batch["counted"].nonzero().flatten().tolist()
        ]
        self.test_answers += rows
        return rows

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``, one value per domain, and what `log_details` adds."""
        results = self.test_counts.results()
        facts = {"domains": list(self.evaluated.domains), "kinds": list(self.evaluated.kinds)}
        self.test_results: dict[str, Any] = facts | {name: value.tolist() for name, value in results.items()}
        self.log_row("test", results["matrix"][0])
        self.log_details(results)

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """What the report shows of the last test."""
        return sections_of_plain(self.test_results, samples)

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
        index = best_answers(logits, top)
        values = logits.float().softmax(-1).gather(-1, index)
        rows = []
        for b in batch["counted"].nonzero().flatten().tolist():
            best = [
                {"answer": self.info.answers[i], "probability": round(p, 6)}
                for i, p in zip(index[b].tolist(), values[b].tolist())
            ]
            rows.append({"id": batch["id"][b], **best[0], "top": best})
        return rows
