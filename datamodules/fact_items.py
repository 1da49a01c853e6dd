"""What data sets of facts to delete share, whatever file they are in: every split is all of the facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from fulgurite.datamodules.base import SPLITS_OF_STAGE, FulguriteDataModule, Split
from fulgurite.datamodules.picture_question import TASK, picture_question
from fulgurite.samples import DataError, DataInfo, Sample
from fulgurite.samples.sampler import GlobalBatchSampler


class FactItems(FulguriteDataModule):
    """Samples with a `Fact`: a question about a picture whose answer is to be deleted, and all that belongs to it.

    Training, validation, test and prediction have the same samples, in the order of the file: they are what is deleted,
    and nothing of them is held out.

    Args:
        in_order: train in the order of the file.
        repeats: training steps on each batch in a row; with ``in_order`` the facts are deleted one batch after the
            other.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.

    Raises:
        DataError: ``repeats`` is below 1.
    """

    domain: str

    def __init__(self, in_order: bool = False, repeats: int = 1, **loading: Any) -> None:
        super().__init__(**loading)
        if repeats < 1:
            raise DataError(f"data.repeats={repeats} must be at least 1")
        self.in_order, self.repeats = in_order, repeats

    def _shuffles(self, split: Split) -> bool:
        return super()._shuffles(split) and not self.in_order

    def _num_batches(self, samples: Sequence[Sample]) -> int:
        return super()._num_batches(samples) * self.repeats

    def _sampler(self, split: Split, samples: Sequence[Sample]) -> GlobalBatchSampler:
        sampler = super()._sampler(split, samples)
        sampler.repeats = self.repeats if split == "train" else 1
        return sampler

    def info(self) -> DataInfo:
        """The domain, the answers and kinds of the facts, and the task."""
        facts = self.samples(SPLITS_OF_STAGE.get(self.stage, ("train",))[0])
        answers = {answer for sample in facts for answer in sample.answers}
        kinds = {sample.kind for sample in facts if sample.kind is not None}
        return DataInfo((self.domain,), tuple(sorted(answers)), tuple(sorted(kinds)), (TASK,))

    @abstractmethod
    def kept(self) -> list[Sample] | None:
        """The samples of the file of what is to stay; None where there is none."""

    def retain(self) -> list[Sample]:
        """Samples that are to stay: those of the file for them, else the neighbour questions of all facts."""
        kept = self.kept()
        return [each for fact in self.samples("train") for each in neighbours(fact)] if kept is None else kept


def neighbours(sample: Sample) -> list[Sample]:
    """The neighbour questions of a fact as samples of their own, ``<id>/0`` and so on, with its picture's features."""
    return [
        picture_question(
            f"{sample.id}/{number}", sample.domain, question, {answer: 1.0}, sample.image, features=sample.features
        )
        for number, (question, answer) in enumerate(sample.fact.neighbour_questions)
    ]
