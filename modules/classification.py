"""Classifying pictures with one encoder and a linear head per task: what every such LightningModule shares.

A task is a domain of the data. A picture is scored by the head of its own domain alone.

Legend: B batch, D width, N domains, A classes of all heads together.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.frames import FrameEncoder, FrameTransform
from fulgurite.checkpoints import MismatchError
from fulgurite.metrics.answer_counts import mean_of_known
from fulgurite.metrics.continual_accuracy import ContinualAccuracy
from fulgurite.metrics.vqa_accuracy import best_answers
from fulgurite.reports.page import Section
from fulgurite.reports.tables import html_table, percent, plain_table
from fulgurite.samples import Batch, Collator, DataError, Sample, pixels_of, sample_fields

Classes = dict[str, tuple[str, ...]]


class PictureCollator:
    """``pixels`` (B, 3, S, S) of a batch of pictures, as the encoder takes them.

    Args:
        transform: the encoder's.
        labelled: whether pictures without a label are refused.
    """

    def __init__(self, transform: FrameTransform, labelled: bool) -> None:
        self.transform = transform
        self.needs = ("image", "answers") if labelled else ("image",)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The pictures may have any sizes."""
        pixels = [self.transform(pixels_of(sample.image)[None])[0] for sample in samples]
        return {**sample_fields(samples), "pixels": torch.stack(pixels)}


class Classifier(pl.LightningModule, ABC):
    """Heads, their scores and their accuracies. A subclass gives the features, and says what trains.

    Args:
        encoder: gives one vector per picture.

    Raises:
        ValueError: the encoder gives several.
    """

    def __init__(self, encoder: FrameEncoder) -> None:
        super().__init__()
        if encoder.grid:
            raise ValueError(
                f"encoder: a classifier needs one vector per picture, set grid to 0 (it is {encoder.grid})"
            )
        self.encoder = without_classifier(encoder)
        self.pretrained = {"source": encoder.name, "digest": encoder.fingerprint}
        self.heads = nn.ModuleDict()
        self.classes: Classes = {}

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, D)."""

    def collator(self, stage: str) -> Collator:
        """The encoder's transform; usable without a trainer. All stages but ``predict`` need labels."""
        return PictureCollator(self.encoder.transform, labelled=stage != "predict")

    def build_heads(self, classes: Mapping[str, Sequence[str]]) -> None:
        """One head per domain, zero at the start. The same call again does nothing.

        Raises:
            MismatchError: there are heads already, for other classes.
            ValueError: a domain's name cannot name a head, or it has fewer than two classes.
        """
        given = {domain: tuple(labels) for domain, labels in classes.items()}
        if self.classes:
            if given != self.classes:
                raise MismatchError(
                    f"the classes of the data are not those of the heads: {shown(given)}, built {shown(self.classes)}"
                )
            return
        for domain, labels in given.items():
            if "." in domain or not domain:
                raise ValueError(f"domain {domain!r} cannot name a head: leave out the dot")
            if len(labels) < 2:
                raise ValueError(f"domain {domain!r} has the classes {labels}; a classifier needs two or more")
            head = nn.Linear(self.encoder.width, len(labels), device=self.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads[domain] = head
        self.classes = given

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Build the heads that a checkpoint's facts describe; the tensors come after this.

        Raises:
            MismatchError: the checkpoint is of no classifier, or there are heads for other classes.
        """
        self.build_heads(classes_in(facts))

    def require_heads(self, domains: Iterable[str]) -> None:
        """Raise `DataError` for a domain without a head."""
        unknown = sorted(set(domains) - self.classes.keys())
        if unknown:
            raise DataError(
                f"no head for the pictures of {unknown}; there are heads for {list(self.classes)}: give a classifier "
                "that was trained on them as --ckpt_path, or name the data's domain as it was in training"
            )

    @property
    def starts(self) -> dict[str, int]:
        """Column of the first class of every head."""
        starts, at = {}, 0
        for domain, labels in self.classes.items():
            starts[domain] = at
            at += len(labels)
        return starts

    def scores_of(self, features: Tensor, domains: Sequence[str]) -> Tensor:
        """(B, A) scores of the classes of every picture's own head; -inf for those of the others.

        Raises:
            DataError: a domain without a head.
        """
        self.require_heads(domains)
        numbers = {domain: number for number, domain in enumerate(self.heads)}
        return self.scores_by_head(features, torch.tensor([numbers[d] for d in domains], device=features.device))

    def scores_by_head(self, features: Tensor, heads: Tensor) -> Tensor:
        """`scores_of` with (B,) numbers of the pictures' heads."""
        parts = [
            head(features).masked_fill((heads != number)[:, None], -torch.inf)
            for number, head in enumerate(self.heads.values())
        ]
        return torch.cat(parts, dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """(B, A) scores, see `scores_of`."""
        return self.scores_of(self.features(batch["pixels"]), batch["domain"])

    def calibration_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures and the numbers of their heads; see `Calibrated`."""
        self.require_heads(batch["domain"])
        numbers = {domain: number for number, domain in enumerate(self.heads)}
        return {
            "pixels": batch["pixels"],
            "head": torch.tensor([numbers[domain] for domain in batch["domain"]], device=batch["pixels"].device),
        }

    def answer_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, A) scores, -inf for the classes of other heads than a picture's own."""
        return self.scores_by_head(self.features(inputs["pixels"]), inputs["head"])

    def answer_targets(self, batch: Batch) -> Tensor:
        """(B, A) 1 for every picture's class, all 0 where its head does not know it; see `Compressible`."""
        labels = self.labels_of(batch)
        known = labels >= 0
        return F.one_hot(labels.where(known, 0), sum(map(len, self.classes.values()))).float() * known[:, None]

    def token_masks(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A head counts the pictures of its own domain alone."""
        own = {domain: inputs["head"] == number for number, domain in enumerate(self.heads)}
        return {rf"heads\.{re.escape(domain)}": mask for domain, mask in own.items()}

    def labels_of(self, batch: Batch) -> Tensor:
        """(B,) column of every picture's class; -1 where it has none that its head knows."""
        columns = {
            (domain, label): self.starts[domain] + i for domain in self.classes for i, label in self.each(domain)
        }
        best = [max(answers, key=answers.__getitem__, default=None) for answers in batch["answers"]]
        return torch.tensor([columns.get(key, -1) for key in zip(batch["domain"], best)], device=self.device)

    def each(self, domain: str) -> Iterable[tuple[int, str]]:
        """The classes of a domain, numbered."""
        return enumerate(self.classes[domain])

    def global_mean(self, losses: Tensor, counted: Tensor) -> Tensor:
        """Mean of (B,) losses over the counted samples of all ranks, as what ranks that average gradients minimise."""
        total = self.trainer.strategy.reduce(counted.sum().float(), reduce_op="sum").clamp(min=1)
        return (losses * counted).sum() * self.trainer.world_size / total

    def classification_loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy of a batch by its own heads."""
        labels = self.labels_of(batch)
        losses = F.cross_entropy(self(batch).float(), labels, reduction="none", ignore_index=-1)
        return self.global_mean(losses, batch["counted"] & (labels >= 0))

    def new_counts(self) -> ContinualAccuracy:
        """Empty counts with a column for every head."""
        return ContinualAccuracy(len(self.classes), 0).to(self.device)

    def count(self, counts: ContinualAccuracy, batch: Batch) -> Tensor:
        """Add a batch; returns its scores."""
        logits, use = self(batch), batch["counted"]
        right = (best_answers(logits, 1)[:, 0] == self.labels_of(batch)).double()
        columns = {domain: i for i, domain in enumerate(self.classes)}
        domains = torch.tensor([columns[domain] for domain in batch["domain"]], device=self.device)
        counts.update(0, domains[use], right[use])
        return logits

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """``accuracy``, the mean over domains, and ``accuracy/<domain>``; a collective where there are ranks."""
        counts = self.new_counts()
        for batch in batches:
            self.count(counts, batch)
        return accuracies(self.classes, counts)

    def log_scores(self, prefix: str, counts: ContinualAccuracy) -> None:
        """Log ``<prefix>/accuracy`` and one value per domain; every rank calls it."""
        found = accuracies(self.classes, counts)
        if not self.trainer.sanity_checking and "accuracy" in found:
            for name, value in found.items():
                self.log(f"{prefix}/{name}", value, prog_bar=name == "accuracy")

    def on_validation_start(self) -> None:
        """Each validation counts anew."""
        self.counts = self.new_counts()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch."""
        self.count(self.counts, batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy``."""
        self.log_scores("val", self.counts)

    def on_test_start(self) -> None:
        """Fresh counts and answers for every test."""
        self.counts = self.new_counts()
        self.test_answers: list[dict[str, Any]] = []

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch, and keep what is answered."""
        logits = self.count(self.counts, batch)
        rows = zip(self.answer_rows(batch, logits), batch["counted"].nonzero().flatten().tolist())
        self.test_answers += [
            {"id": row["id"], "domain": batch["domain"][b], "gold": batch["answers"][b], "answer": row["answer"]}
            for row, b in rows
        ]

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy``."""
        self.log_scores("test", self.counts)
        pictures = self.trainer.strategy.reduce(self.counts.count[0, :, -1].clone(), reduce_op="sum")
        self.test_results = {
            "domains": list(self.classes),
            "classes": {domain: list(labels) for domain, labels in self.classes.items()},
            "accuracy": self.counts.results()["matrix"][0].tolist(),
            "pictures": pictures.tolist(),
        }

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """The accuracy on every domain."""
        header = ["domain", "classes", "pictures", "accuracy, %"]
        results = self.test_results
        rows = [
            [domain, str(len(self.classes[domain])), f"{pictures:.0f}", percent(accuracy)]
            for domain, pictures, accuracy in zip(results["domains"], results["pictures"], results["accuracy"])
        ]
        title = "Accuracy on test pictures"
        return [Section(title, html_table(header, rows), printed=plain_table(title, header, rows))]

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Classes with probabilities for every counted picture."""
        return self.answer_rows(batch, self(batch))

    def answer_rows(self, batch: Batch, logits: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """One JSON-able row per counted picture: id, answer, probability, the best ``top`` with probabilities."""
        index, rows = best_answers(logits, top), []
        values = logits.float().softmax(-1).gather(-1, index)
        for b in batch["counted"].nonzero().flatten().tolist():
            labels, start = self.classes[batch["domain"][b]], self.starts[batch["domain"][b]]
            best = [
                {"answer": labels[i - start], "probability": round(p, 6)}
                for i, p in zip(index[b].tolist(), values[b].tolist())
                if start <= i < start + len(labels)
            ]
            rows.append({"id": batch["id"][b], **best[0], "top": best})
        return rows


def without_classifier(encoder: FrameEncoder) -> FrameEncoder:
    """The encoder without the classifier that it was pretrained with, where it is a model of timm that has one."""
    reset = getattr(getattr(encoder, "model", None), "reset_classifier", None)
    if reset is not None:
        reset(0)
    return encoder


def accuracies(classes: Classes, counts: ContinualAccuracy) -> dict[str, float]:
    """Mean over domains and one value per domain, without those of which nothing was counted."""
    row = counts.results()["matrix"][0]
    found = {f"accuracy/{domain}": value for domain, value in zip(classes, row.tolist()) if value == value}
    return {"accuracy": mean_of_known(row), **found} if found else {}


def classes_of(datamodule: Any) -> Classes:
    """Classes by domain: the vocabulary; of several domains, what of it their training samples have.

    Empty where the data say nothing of classes, as pictures to predict do.
    """
    info = datamodule.info()
    if len(info.domains) == 1:
        return {info.domains[0]: info.answers} if info.answers else {}
    found: dict[str, set[str]] = {domain: set() for domain in info.domains}
    for sample in datamodule.samples("train"):
        found[sample.domain].update(sample.answers)
    return {domain: tuple(a for a in info.answers if a in labels) for domain, labels in found.items() if labels}


def classes_in(facts: Mapping[str, Any]) -> Classes:
    """Classes by domain, of a checkpoint's facts. Raises `MismatchError` where they hold none."""
    if not facts.get("classes"):
        raise MismatchError("the checkpoint names no classes: it was not written by an image classifier")
    return {domain: tuple(labels) for domain, labels in facts["classes"].items()}


def shown(classes: Classes) -> str:
    """Domains with the number of their classes and the first few."""
    return ", ".join(f"{domain}: {len(labels)} ({', '.join(labels[:3])}, ..)" for domain, labels in classes.items())
