"""Fine-tuning a pretrained image encoder on labelled pictures, all of its weights.

Checkpoints are self-contained: encoder and heads. Those of several runs from one pretrained encoder are what a merge
takes; see `fulgurite.methods.merging`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.specs import spec_of
from fulgurite.methods.schedules import Schedule, StagedSchedule, WarmupLinear
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.classification import Classifier, classes_in, classes_of
from fulgurite.modules.optimization import ParamGroup, grouped, steps_of_stages
from fulgurite.samples import Batch


class ImageClassifier(Classifier):
    """An image encoder that trains, and a linear head for each domain of the data.

    Args:
        encoder: the pretrained encoder, with ``grid: 0``; `TimmFrameEncoder` or `OpenClipFrameEncoder`.
        statistics: of batch normalisation: those of every ``batch`` while training, which the running ones follow (with
            several processes each sees its own share, and the first one's are stored), or the ``pretrained`` ones
            throughout, so that runs from one encoder have them in common.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate (``heads``, ``encoder``); the rest uses the optimizer's.
    """

    compressible_part = "encoder.model"

    def __init__(
        self,
        encoder: FrameEncoder,
        statistics: Literal["batch", "pretrained"] = "batch",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__(encoder)
        self.encoder.requires_grad_(True)
        self.statistics = statistics
        self.optimizer, self.schedule = optimizer or torch.optim.AdamW, schedule or WarmupLinear()
        self.param_groups = param_groups or []

    def features(self, pixels: Tensor) -> Tensor:
        """As in the base."""
        return self.encoder(pixels).squeeze(1)

    def train(self, mode: bool = True) -> ImageClassifier:
        """The encoder's model too, which its wrapper would keep in evaluation mode."""
        super().train(mode)
        self.encoder.model.train(mode)
        for layer in self.encoder.model.modules():
            if isinstance(layer, _BatchNorm) and self.statistics == "pretrained":
                layer.eval()
        return self

    def on_fit_start(self) -> None:
        """Lightning leaves every part in the mode that it finds it in, and encoders come in evaluation mode."""
        self.train()

    def blocks_spec(self) -> ModelSpec:
        """That of the encoder's model by its library; see `Compressible`."""
        return spec_of(self.encoder.model)

    def pass_blocks(self, inputs: dict[str, Tensor]) -> None:
        """Through the encoder."""
        self.features(inputs["pixels"])

    def weights_changed(self) -> dict[str, Any]:
        """Nothing is derived from the encoder."""
        return {}

    def setup(self, stage: str) -> None:
        """Build the heads from the DataModule's classes; where it has none, a checkpoint brings them."""
        classes = classes_of(self.trainer.datamodule)
        if stage == "fit" or (classes and not self.classes):
            self.build_heads(classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy over the counted pictures of the global batch, whatever the number of ranks."""
        loss = self.classification_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["id"]), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """All parameters, with one schedule over the global step restarted at every stage."""
        optimizer = self.optimizer(grouped(dict(self.named_parameters()), self.param_groups))
        staged = StagedSchedule(self.schedule, steps_of_stages(self.trainer.datamodule.stages(), self.trainer))
        # A function is left out of checkpoints, an object is not.
        scheduler = LambdaLR(optimizer, lambda step: staged(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the classes, and which pretrained encoder the run began with."""
        facts = {"classes": {domain: list(labels) for domain, labels in self.classes.items()}}
        given = checkpoint.get("fulgurite", {})
        checkpoint["fulgurite"] = {**given, "kind": "self-contained", **facts, "pretrained": self.pretrained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the heads of the checkpoint; a fit goes on with the same classes only.

        Raises:
            MismatchError: the checkpoint is of no image classifier, or a fit has other classes.
        """
        facts = checkpoint.get("fulgurite", {})
        if self.trainer.state.fn != "fit" and classes_in(facts) != self.classes:
            self.heads.clear()
            self.classes = {}
        self.restore(facts)
