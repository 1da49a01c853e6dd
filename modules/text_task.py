"""Labels or scores of one text or two, as of GLUE, by a head: the setting of FISH masks (arXiv 2111.09839).

Models that write the label instead, as LST trains T5 on GLUE, are trained by `VisionLanguageGeneration` with a backbone
that reads no pictures.

Legend: B samples, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fulgurite.backbones.text_classifier import TextClassifier
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.schedules import Schedule
from fulgurite.modules.answering import AnsweringModule
from fulgurite.modules.data_start import Inputs
from fulgurite.modules.optimization import ParamGroup
from fulgurite.samples import Batch, DataError, DataInfo, Stage


class TextTask(AnsweringModule):
    """Cross entropy over the data's labels, or where they have none the squared error of a score.

    Args:
        backbone: encoder with a head.
        adapters: what trains beside it, and where; None trains all of it. The head trains if they say so.
        frozen: patterns of the backbone's parameters that do not train without adapters; None takes its own.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate or weight decay; the rest uses the optimizer's.
    """

    def __init__(
        self,
        backbone: TextClassifier,
        adapters: list[Placement] | None = None,
        frozen: list[str] | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__(backbone, adapters, optimizer, schedule, param_groups, frozen)

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """The labels, in the order of the scores.

        Raises:
            DataError: the head has another number of them.
        """
        wanted = len(info.answers) or 1
        if wanted != self.backbone.num_labels:
            raise DataError(
                f"the data have {len(info.answers)} labels, and the head gives {self.backbone.num_labels} scores: set "
                f"model.init_args.backbone.init_args.num_labels={wanted}"
            )
        self.labels = info.answers

    def forward(self, batch: Batch) -> Tensor:
        """(B, C) scores."""
        return self.backbone(batch)

    def targets(self, batch: Batch) -> Tensor:
        """(B,) numbers of the labels, or scores.

        Raises:
            DataError: a sample has no label, or none that is known, or data without labels one that is no number.
        """
        best = [max(answers, key=answers.__getitem__, default=None) for answers in batch["answers"]]
        numbers = {label: number for number, label in enumerate(self.labels)}
        for name, label in zip(batch["id"], best):
            if label is None or (self.labels and label not in numbers):
                raise DataError(f"sample {name!r} has the label {label!r}, which is none of {list(self.labels)}")
        if self.labels:
            return torch.tensor([numbers[label] for label in best], device=self.device)
        try:
            return torch.tensor([float(label) for label in best], device=self.device)
        except ValueError as error:
            raise DataError(
                f"samples {batch['id']} have answers that are no scores ({error}), and the data name no labels: for "
                "answers in words take VisionLanguageGeneration"
            ) from error

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) of (B, C) scores."""
        if self.labels:
            return F.cross_entropy(logits.float(), targets, reduction="none")
        return F.mse_loss(logits[:, 0].float(), targets, reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the counted samples of the global batch, whatever the number of processes."""
        losses = self.losses(self(batch), self.targets(batch))
        ones = torch.ones_like(losses)
        return self.batch_loss(losses, batch, ["samples"] * len(losses), ones, ones)

    def write(self, batch: Batch) -> list[str]:
        """The likeliest label of each sample, or its score."""
        logits = self(batch)
        if self.labels:
            return [self.labels[best] for best in logits.argmax(-1).tolist()]
        return [f"{score:.6g}" for score in logits[:, 0].tolist()]

    def example_inputs(self, batch: Batch) -> Inputs:
        """Texts and labels; see `ByExample`."""
        texts = {name: batch[name] for name in ("text", "text_mask", "segment") if name in batch}
        return {**texts, "targets": self.targets(batch)}

    def example_losses(self, inputs: Inputs) -> Tensor:
        """(B,) losses; see `ByExample`."""
        return self.losses(self.backbone(inputs), inputs["targets"])

    def example_logits(self, inputs: Inputs) -> Tensor:
        """(B, C) scores; see `ByExample`."""
        return self.backbone(inputs)
