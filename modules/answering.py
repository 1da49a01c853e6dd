"""Modules whose answers are texts, each judged by the figures of its task: what all of them share.

A subclass says how a batch is answered (`write`) and trained. A batch may hold one task or several.

Legend: B samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.generation_losses import LossKind, sample_weights
from fulgurite.metrics.captions import CaptionScores
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.data_start import Inputs, scores_of_mask, start_from_data
from fulgurite.modules.generation_scores import WrittenScores, answer_rows
from fulgurite.modules.task_gradients import TaskGradients
from fulgurite.reports.generation import sections_of_generation
from fulgurite.reports.page import Section
from fulgurite.samples import Batch, DataError, DataInfo, Sample, Stage


class AnsweringModule(AdaptedModule):
    """Answers in texts; see `AdaptedModule` for the arguments."""

    caption_metric: Any = CaptionScores

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task_gradients = TaskGradients(self.bank)

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Nothing has a shape that depends on the data, unless a subclass says so."""

    def setup(self, stage: str) -> None:
        """As in the base, on any data. What starts from the data does so when a run begins, not when it is resumed.

        Raises:
            DataError: adapters per task do not know a task of the data.
        """
        datamodule = self.trainer.datamodule
        self.data_info = datamodule.info()
        unknown = sorted(set(self.data_info.tasks) - set(self.bank.tasks)) if self.bank.tasks else []
        if unknown:
            raise DataError(
                f"the data have the tasks {unknown}, and the adapters are those of {list(self.bank.tasks)}: name them "
                "in the tasks of model.init_args.adapters"
            )
        if stage == "fit" or self.info is None:
            self.prepare(self.data_info, datamodule.stages())
        if stage == "fit" and self.trainer.ckpt_path is None:
            start_from_data(self.trainer, self)

    def task_numbers(self, batch: Batch) -> Tensor | None:
        """(B,) long, each sample's task among those that the adapters route by; None where they do not.

        Raises:
            DataError: a task that they do not know.
        """
        known = self.bank.tasks
        unknown = sorted(set(batch["task"]) - set(known)) if known else []
        if unknown:
            raise DataError(f"samples of the tasks {unknown} have no adapters; there are those of {list(known)}")
        return torch.tensor([known.index(task) for task in batch["task"]]) if known else None

    @property
    def shares_tasks(self) -> bool:
        """Whether processes train adapters that each belong to one task."""
        trained = self._trainer is not None and self._trainer.world_size > 1
        return trained and bool(self.task_gradients.parameters())

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def on_after_backward(self) -> None:
        """Adapters of tasks that no process has seen get no step."""
        if self.shares_tasks:
            self.task_gradients.settle()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Tasks are counted from step to step, whatever is accumulated."""
        super().optimizer_step(*args, **kwargs)
        self.task_gradients.clear()

    @abstractmethod
    def write(self, batch: Batch) -> list[str]:
        """The answers to a batch. Under several processes a collective."""

    def mask_scores(self, mask: SparseMask) -> dict[str, Tensor]:
        """Scores from training samples, by which `MaskRefresh` chooses a mask anew. A collective."""
        return scores_of_mask(self.trainer, self, mask)

    @abstractmethod
    def example_inputs(self, batch: Batch) -> Inputs:
        """See `ByExample`."""

    @abstractmethod
    def example_losses(self, inputs: Inputs) -> Tensor:
        """See `ByExample`."""

    @abstractmethod
    def example_logits(self, inputs: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        """See `ByExample`."""

    def batch_loss(
        self, losses: Tensor, batch: Batch, kinds: Sequence[LossKind], scores: Tensor, lengths: Tensor
    ) -> Tensor:
        """The loss of the global batch of (B,) losses, whatever the number of processes, and its log.

        Args:
            losses: token means of this process's samples.
            batch: theirs.
            kinds: of their losses.
            scores: (B,) of the answers that are learned.
            lengths: (B,) tokens of these.
        """
        weights = sample_weights(kinds, scores, lengths, batch["counted"], self.total)
        loss = (losses * weights).sum() * self.trainer.world_size
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(losses), sync_dist=True)
        if self.one_task_a_batch:
            self.log(f"train/loss/{batch['task'][0]}", loss.detach(), batch_size=len(losses), sync_dist=True)
        return loss

    @property
    def one_task_a_batch(self) -> bool:
        """Whether the data give training batches of one task of several, the same one on every process."""
        return getattr(self.trainer.datamodule, "batches", None) == "one_task" and len(self.info.tasks) > 1

    def new_scores(self) -> WrittenScores:
        """Empty, of the tasks of the present data."""
        return WrittenScores(self.data_info or self.info, self.device, self.caption_metric)

    def log_figures(self, prefix: str, figures: Mapping[str, float]) -> None:
        """Log ``<prefix>/<figure>/<task>`` and ``<prefix>/score``; every process calls it with the same."""
        for name, value in figures.items():
            self.log(f"{prefix}/{name}", value, prog_bar=name == "score")

    def on_validation_start(self) -> None:
        """Each validation counts anew."""
        self.val_scores = self.new_scores()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge one batch."""
        self.val_scores.add(self.write(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<figure>/<task>``."""
        if not self.trainer.sanity_checking:
            self.log_figures("val", self.val_scores.figures())

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The figures of the present weights; see `Scored`."""
        scores = self.new_scores()
        for batch in batches:
            scores.add(self.write(batch), batch)
        return scores.figures()

    def on_test_start(self) -> None:
        """Fresh counts and answers for every test."""
        self.test_scores = self.new_scores()
        self.test_answers: list[dict[str, Any]] = []

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge one batch, and keep what was written."""
        answers = self.write(batch)
        self.test_scores.add(answers, batch)
        self.test_answers += answer_rows(answers, batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<figure>/<task>``."""
        figures = self.test_scores.figures()
        self.test_results: dict[str, Any] = {"figures": figures, "tasks": list(self.test_scores.tasks)}
        self.log_figures("test", figures)

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """The figures of every task, and examples with pictures; see `ReportSource`."""
        return sections_of_generation(self.test_results, self.test_answers, samples)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One JSON-able row per counted sample: id, task, answer."""
        rows = answer_rows(self.write(batch), batch)
        return [{name: row[name] for name in ("id", "task", "answer")} for row in rows]
